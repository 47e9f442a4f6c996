// The names of csrc/cuda/device.h for g++: CUDA kernels run on the host, one block after the other,
// a block's threads as fibres (see emulator.cpp). This file stands before the real one on the
// include path, so that kernels compile unchanged. Only what our kernels use is here.
//
// What it reports, as an exception out of the launch: a barrier or warp function that not all
// threads reach, a launch that no device would take, too much shared memory, an address that is not
// aligned, asynchronous copies that nobody waits for. What it makes visible: shared memory and the
// tensors that ops make start as NaN, asynchronous copies happen only when they are waited for,
// threads run in turns as long as they can (upwards in one block, downwards in the next), so that a
// missing barrier changes numbers; under AddressSanitizer each shared array and each tensor ends in
// a red zone.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define FASTCLS_SM80 1

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Of the thread that runs. Blocks are one-dimensional: threadIdx.y and z stay 0.
inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), blockDim, gridDim;

namespace fastcls::emulator {

// Runs kernel() for every thread of the grid; throws std::runtime_error for the faults above.
// `shared_bytes` is what DYNAMIC_SHARED gives.
void run(dim3 grid, int threads, const std::function<void()>& kernel, size_t shared_bytes = 0);

void sync_block();
void sync_warp();
// Memory of the block that belongs to a declaration (`site`), the same for all its threads.
void* shared_array(const void* site, size_t bytes);
unsigned char* dynamic_shared();
// Throws unless `pointer` is aligned to 16.
void check_aligned(const void* pointer, const char* what);
// All lanes of a warp pass a value of at most 8 bytes: returns the 32 values in lane order, valid
// until the lane's next warp function.
const uint64_t* exchange(uint64_t value);

template <typename T>
T from_lane(T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  T result;
  std::memcpy(&result, exchange(bits) + lane, sizeof(T));
  return result;
}

// The operands of a warp's matrix product, as plain matrices that its lanes fill together.
struct MatrixPair {
  float a[16][16], b[16][8];
};
// Two in turns, like the values of exchange().
MatrixPair& next_matrices();
// The lane's four elements of d += a · b over the first `depth` of a's columns.
void multiply_add(float (&d)[4], const MatrixPair& pair, int depth);

// d += a · b, see mma_bf16 in csrc/cuda/device.h. A 32-bit word holds kPerWord elements, and word w
// of a lane starts at element kPerWord * w along k; to_floats(word, floats) takes it apart.
template <int kPerWord, typename ToFloats>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
              const ToFloats& to_floats) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  MatrixPair& pair = next_matrices();
  float elements[2];
  for (int i = 0; i < 4; ++i) {
    to_floats(a[i], elements);
    for (int e = 0; e < kPerWord; ++e)
      pair.a[g + i % 2 * 8][(t + i / 2 * 4) * kPerWord + e] = elements[e];
  }
  for (int i = 0; i < 2; ++i) {
    to_floats(i == 0 ? b0 : b1, elements);
    for (int e = 0; e < kPerWord; ++e) pair.b[(t + i * 4) * kPerWord + e][g] = elements[e];
  }
  sync_warp();
  multiply_add(d, pair, 8 * kPerWord);
}

// What a lane gets of matrices whose row addresses the lanes pass.
inline void load_words(uint32_t* words, int matrices, const void* row, bool transposed) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (lane < 8 * matrices) check_aligned(row, "load_matrices from");
  const uint64_t* rows = exchange(reinterpret_cast<uintptr_t>(row));
  for (int m = 0; m < matrices; ++m) {
    auto at = [&](int r) { return reinterpret_cast<const char*>(rows[8 * m + r]); };
    if (!transposed) {
      std::memcpy(&words[m], at(g) + 4 * t, 4);
    } else {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) std::memcpy(&pair[e], at(2 * t + e) + 2 * g, 2);
      std::memcpy(&words[m], pair, 4);
    }
  }
}

// 16 bytes, zeros where `from` is null.
inline void copy_16(void* to, const void* from) {
  if (from)
    std::memcpy(to, from, 16);
  else
    std::memset(to, 0, 16);
}
void copy_async(void* to, const void* from, bool zeros);
void copy_async_commit();
// `copy` is called here, so that AddressSanitizer watches it as part of the kernel.
void copy_async_wait(int latest, void (*copy)(void* to, const void* from));

}  // namespace fastcls::emulator

namespace fastcls::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

inline void forget(uint4&) {}
constexpr bool runs_kernels(bool, bool) { return true; }  // devices of every kind are emulated
inline float max_nan(float a, float b) { return a > b || a != a ? a : b; }
// Errs as far as the hardware may, except at 0: upwards for one half of the numbers, downwards for
// the other.
inline float exp2_approx(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const float exact = std::exp2(x), error = bits % 2 ? 0x1p-22f : -0x1p-22f;
  return x == 0 ? exact : exact + exact * error;
}
// Threads run one at a time.
inline unsigned count_after_writing(unsigned* counter, unsigned last) {
  const unsigned old = *counter;
  *counter = old >= last ? 0 : old + 1;
  return old;
}
inline double load_shared_by_blocks(const double* from) { return *from; }
template <typename T>
uint32_t pack_pair(float low, float high) {
  return static_cast<T>(low).x | static_cast<uint32_t>(static_cast<T>(high).x) << 16;
}
inline uint32_t pack_bf16(float low, float high) {
  return pack_pair<torch::headeronly::BFloat16>(low, high);
}
inline uint32_t pack_f16(float low, float high) {
  return pack_pair<torch::headeronly::Half>(low, high);
}
template <typename T>
uint32_t max_pairs(uint32_t a, uint32_t b) {
  float x[2];
  for (int i = 0; i < 2; ++i)
    x[i] = std::fmax(static_cast<float>(T(static_cast<uint16_t>(a >> 16 * i), T::from_bits())),
                     static_cast<float>(T(static_cast<uint16_t>(b >> 16 * i), T::from_bits())));
  return pack_pair<T>(x[0], x[1]);
}
inline uint32_t max_bf16_pairs(uint32_t a, uint32_t b) {
  return max_pairs<torch::headeronly::BFloat16>(a, b);
}
inline uint32_t max_f16_pairs(uint32_t a, uint32_t b) {
  return max_pairs<torch::headeronly::Half>(a, b);
}
inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline void trap() { throw std::runtime_error("emulator: trap"); }

inline uint32_t shift_left(uint32_t value, uint32_t bits) { return bits < 32 ? value << bits : 0; }
inline int64_t multiply_add_wide(int a, int b, int64_t c) {
  return static_cast<int64_t>(a) * b + c;
}
using SharedAddress = const unsigned char*;
inline SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(pointer);
}

inline void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  emulator::load_words(r, 4, row, false);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulator::load_words(r, 4, row, true);
}

template <typename Half>
void mma_halves(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply<2>(d, a, b0, b1, [](uint32_t word, float (&out)[2]) {
    Half halves[2];
    std::memcpy(halves, &word, sizeof(word));
    out[0] = halves[0], out[1] = halves[1];
  });
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_halves<torch::headeronly::BFloat16>(d, a, b0, b1);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_halves<torch::headeronly::Half>(d, a, b0, b1);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply<1>(d, a, b0, b1, [](uint32_t word, float (&out)[2]) {
    word &= 0xffffe000u;
    std::memcpy(out, &word, sizeof(word));
  });
}

// Half of the last bit kept is added; infinities and NaN stay what they are.
inline uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0x1000u;
  return bits & 0xffffe000u;
}

inline void copy_async(void* to, const void* from, bool zeros) {
  emulator::copy_async(to, from, zeros);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int kLatest>
void copy_async_wait() {
  emulator::copy_async_wait(kLatest, emulator::copy_16);
}

}  // namespace fastcls::cuda

// Byte i of the result is the one of (a, b)'s eight that digit i of `selector` names.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
// 0xff for every byte of a that is equal to b's, else 0.
inline unsigned __vcmpeq4(unsigned a, unsigned b) {
  unsigned result = 0;
  for (unsigned byte = 0xff; byte; byte <<= 8)
    if (((a ^ b) & byte) == 0) result |= byte;
  return result;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }

#define DYNAMIC_SHARED(name) unsigned char* const name = fastcls::emulator::dynamic_shared()

#define SHARED_ARRAY(type, name, count)              \
  static const char name##_site = 0;                 \
  type(&name)[count] = *static_cast<type(*)[count]>( \
      fastcls::emulator::shared_array(&name##_site, sizeof(type[count])))

inline void __syncthreads() { fastcls::emulator::sync_block(); }

// Of a lane in a group of `width` that comes after its own, a lane gets its own value.
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
  const int lane = threadIdx.x % 32, source = lane ^ mask;
  return fastcls::emulator::from_lane(value, source / width <= lane / width ? source : lane);
}
