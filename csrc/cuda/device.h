// What kernels use of a GPU. Kernels are plain CUDA C++ and keep to this list, so that the host
// emulator can run them: tests/emulator/cuda/device.h implements the same names for g++ and stands
// first on the emulator's include path.
//
//   threadIdx, blockIdx, blockDim, gridDim      __global__, __device__, __launch_bounds__
//   SHARED_ARRAY(type, name, count)             DYNAMIC_SHARED(name)
//   __syncthreads(), __shfl_xor_sync, __umulhi, __byte_perm, __vcmpeq4, fmaxf, fminf, uint2, uint4,
//   and the functions below
//
// Warp functions are called by all 32 threads of a warp, with mask kFullWarp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastcls::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Before compute capability 8.0 there are no asynchronous copies, and the matrix unit reads no type
// but float16. Host code asks Launcher::arch() and launches nothing there that multiplies others;
// should it do so all the same, the kernel traps.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define FASTCLS_SM80 1
#else
#define FASTCLS_SM80 0
#endif

// Is the code compiled for devices that run a kernel for compute capability 8.0 and more, or for
// less?
constexpr bool runs_kernels(bool from_80, bool before_80) {
  return FASTCLS_SM80 ? from_80 : before_80;
}

// Ends the kernel with an error.
__device__ inline void trap() { asm volatile("trap;"); }

// value << bits, 0 for 32 bits and more.
__device__ inline uint32_t shift_left(uint32_t value, uint32_t bits) {
  uint32_t shifted;
  asm("shl.b32 %0, %1, %2;" : "=r"(shifted) : "r"(value), "r"(bits));
  return shifted;
}

// a * b + c in one instruction. Where `b` stays the same in a loop the compiler would keep all 64
// bits of it and multiply those.
__device__ inline int64_t multiply_add_wide(int a, int b, int64_t c) {
  int64_t sum;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(sum) : "r"(a), "r"(b), "l"(c));
  return sum;
}

// A place in shared memory in half the registers of a pointer.
using SharedAddress = unsigned;
__device__ inline SharedAddress shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 2^x to some 2^-22, results below 2^-126 as 0.
__device__ inline float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The larger one; NaN if either is.
__device__ inline float max_nan(float a, float b) {
#if FASTCLS_SM80
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a > b || a != a ? a : b;
#endif
}

// Counts up to `last` and from there to 0 again; returns what the counter was. What the thread has
// written before is there for whoever counts after it.
__device__ inline unsigned count_after_writing(unsigned* counter, unsigned last) {
  unsigned old;
  asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(counter), "r"(last)
               : "memory");
  return old;
}

// What another block has written before it counted, while both ran.
__device__ inline double load_shared_by_blocks(const double* from) { return __ldcg(from); }

__device__ inline float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t bits_of_float(float value) { return __float_as_uint(value); }

// The larger of each pair of 16-bit elements; a number rather than a NaN.
__device__ inline uint32_t max_bf16_pairs(uint32_t a, uint32_t b) {
  uint32_t result = 0;
#if FASTCLS_SM80
  asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
#else
  const uint32_t low = __float_as_uint(fmaxf(__uint_as_float(a << 16), __uint_as_float(b << 16)));
  const uint32_t high =
      __float_as_uint(fmaxf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u)));
  result = high | low >> 16;
#endif
  return result;
}
__device__ inline uint32_t max_f16_pairs(uint32_t a, uint32_t b) {
  uint32_t result = 0;
#if FASTCLS_SM80
  asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
#else
  for (int shift = 0; shift < 32; shift += 16) {
    const float x = __half2float(__ushort_as_half(static_cast<unsigned short>(a >> shift)));
    const float y = __half2float(__ushort_as_half(static_cast<unsigned short>(b >> shift)));
    result |= static_cast<uint32_t>(__half_as_ushort(__float2half_rn(fmaxf(x, y)))) << shift;
  }
#endif
  return result;
}

// Two numbers, rounded to 16 bits, in a word.
__device__ inline uint32_t pack_bf16(float low, float high) {
#if FASTCLS_SM80
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  const uint32_t first = __bfloat16_as_ushort(__float2bfloat16_rn(low));
  return first | static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
#endif
}
__device__ inline uint32_t pack_f16(float low, float high) {
  const uint32_t first = __half_as_ushort(__float2half_rn(low));
  return first | static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16;
}

// Makes the compiler take these bits for new ones: what it has made of them before is made again
// instead of kept in registers.
__device__ inline void forget(uint4& bits) {
  asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
}

// ---- Matrix fragments. In a warp, thread 4 g + t holds of an 8 x 8 matrix of 16-bit elements, or
// of 8 rows of four 32-bit ones, the 32-bit word t of row g.

// Four such matrices in one go: lane i passes the address of row i % 8 of matrix i / 8, 16 bytes
// aligned to 16.
__device__ inline void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The same for 16-bit elements, transposed: thread 4 g + t gets column g of rows 2 t and 2 t + 1.
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a · b with float sums: a [16, k], b [k, 8], d [16, 8]; k = 16 for 16-bit elements, 8 for
// tf32.
//
//   a[0], a[1]  words 0-3 of rows 0-7 and 8-15      b[0]  words 0-3 of columns 0-7 (along k)
//   a[2], a[3]  words 4-7 of the same rows          b[1]  words 4-7
//   d[0], d[1]  columns 2 t, 2 t + 1 of row g       d[2], d[3]  of row g + 8
//
// Before 8.0 k = 8 is all that the matrix unit takes at a time.
#if FASTCLS_SM80
#define FASTCLS_MMA(shape_and_types)                                              \
  asm volatile("mma.sync.aligned." shape_and_types                                \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#else
#define FASTCLS_MMA(shape_and_types) asm volatile("trap;")
#endif

__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FASTCLS_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
__device__ inline void mma_f16_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"
      " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if FASTCLS_SM80
  FASTCLS_MMA("m16n8k16.row.col.f32.f16.f16.f32");
#else
  mma_f16_half(d, a[0], a[1], b0);
  mma_f16_half(d, a[2], a[3], b1);
#endif
}
__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FASTCLS_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}

// The nearest tf32, as bits: 10 bits of mantissa. The matrix unit itself would cut the others off.
__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits = 0;
#if FASTCLS_SM80
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#else
  asm volatile("trap;");
#endif
  return bits;
}

// ---- Copies to shared memory that run while the thread goes on: 16 bytes, aligned to 16, or 16
// bytes of zeros. The thread sees those of a group once it has waited; others after a barrier.

__device__ inline void copy_async(void* to, const void* from, bool zeros) {
#if FASTCLS_SM80
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(zeros ? 0 : 16)
               : "memory");
#else
  *static_cast<uint4*>(to) = zeros ? uint4{} : *static_cast<const uint4*>(from);
#endif
}

// Closes the group of copies begun since the last call.
__device__ inline void copy_async_commit() {
#if FASTCLS_SM80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups but the `kLatest` that were closed last.
template <int kLatest>
__device__ inline void copy_async_wait() {
#if FASTCLS_SM80
  asm volatile("cp.async.wait_group %0;" ::"n"(kLatest) : "memory");
#endif
}

}  // namespace fastcls::cuda

// An array in the block's shared memory, uninitialised.
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]
// The shared memory that the launch asks for: bytes, aligned to 16, uninitialised.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
