// Small kernels, right and wrong ones, that show what the emulator does. Called through ctypes.
#include "cuda/device.h"

#include <cstdio>
#include <exception>

namespace {

using fastcls::cuda::kFullWarp;
using fastcls::emulator::run;

__global__ void sum_warps(const float* x, float* sums) {
  float sum = x[threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
}

__global__ void shuffle(int mask, int width, const int* x, int* out) {
  out[threadIdx.x] = __shfl_xor_sync(kFullWarp, x[threadIdx.x], mask, width);
}

// Each thread passes its value to the neighbour `step` further on, through shared memory.
__global__ void rotate(int step, bool with_barrier, const float* x, float* out) {
  SHARED_ARRAY(float, passed, 64);
  passed[threadIdx.x] = x[threadIdx.x];
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = passed[(threadIdx.x + step) % 64];
}

__global__ void barrier_for(unsigned threads) {
  if (threadIdx.x < threads) __syncthreads();
}

__global__ void shuffle_for(unsigned threads) {
  if (threadIdx.x < threads) __shfl_xor_sync(kFullWarp, 0, 1);
}

__global__ void write_at(int index, float* out) { out[index] = 1; }

__global__ void write_shared_at(int index) {
  SHARED_ARRAY(float, array, 8);
  float* data = array;
  data[index] = 1;
}

__global__ void take_shared() {
  SHARED_ARRAY(double, half, 4096);
  SHARED_ARRAY(double, more, 4096);
  half[0] = more[0] = 0;
}

using fastcls::cuda::copy_async;

// A warp multiplies a [16, k] by b [8, k] transposed, 16 bytes of k at a time lying in rows of
// shared memory; `mode` is the operands' type.
enum Mode { kBf16, kF16, kTf32 };

__global__ void multiply(int mode, int row_bytes, const void* a, const void* b, float* d) {
  using namespace fastcls::cuda;
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x, pieces = row_bytes / 16;
  for (int i = lane; i < 24 * pieces; i += 32) {
    const char* from = i < 16 * pieces ? static_cast<const char*>(a) + 16 * i
                                       : static_cast<const char*>(b) + 16 * (i - 16 * pieces);
    std::memcpy(shared + i * 16, from, 16);
  }
  __syncthreads();
  float sums[4] = {};
  for (int depth = 0; depth < row_bytes; depth += 32) {
    uint32_t left[4], right[4];
    load_matrices(left, shared_address(shared + lane % 16 * row_bytes + lane / 16 * 16 + depth));
    load_matrices(right,
                  shared_address(shared + (16 + lane % 8) * row_bytes + lane / 8 % 2 * 16 + depth));
    if (mode == kBf16) mma_bf16(sums, left, right[0], right[1]);
    if (mode == kF16) mma_f16(sums, left, right[0], right[1]);
    if (mode == kTf32) mma_tf32(sums, left, right[0], right[1]);
  }
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// The same of halves with a [16 positions, 16], b [16 positions, 8], both read across their rows.
__global__ void multiply_transposed(const void* a, const void* b, float* d) {
  using namespace fastcls::cuda;
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x;
  std::memcpy(shared + lane * 16, static_cast<const char*>(a) + lane * 16, 16);
  if (lane < 16) std::memcpy(shared + 512 + lane * 16, static_cast<const char*>(b) + lane * 16, 16);
  __syncthreads();
  uint32_t left[4], right[4];
  load_matrices_transposed(left, shared + (lane / 16 * 8 + lane % 8) * 32 + lane / 8 % 2 * 16);
  load_matrices_transposed(right, shared + 512 + lane % 16 * 16);  // its first two twice
  float sums[4] = {};
  mma_f16(sums, left, right[0], right[1]);
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// Copies one vector into the first of two places; waits for it if told to.
__global__ void copy(int offset, bool wait, const char* from, char* to) {
  DYNAMIC_SHARED(shared);
  copy_async(shared, from + offset, false);
  copy_async(shared + 16, nullptr, true);
  fastcls::cuda::copy_async_commit();
  if (wait) fastcls::cuda::copy_async_wait<0>();
  std::memcpy(to, shared, 32);
}

// 0 and an empty message, or 1 and what the emulator reported.
template <typename F>
int reported(char* message, const F& f) {
  message[0] = 0;
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, 1000, "%s", error.what());
    return 1;
  }
}

}  // namespace

#define PROBE extern "C" __attribute__((visibility("default"))) int

PROBE probe_sum_warps(char* message, const float* x, float* sums) {
  return reported(message, [&] { run(1, 64, [&] { sum_warps(x, sums); }); });
}
PROBE probe_shuffle(char* message, int mask, int width, const int* x, int* out) {
  return reported(message, [&] { run(1, 32, [&] { shuffle(mask, width, x, out); }); });
}
PROBE probe_rotate(char* message, int step, int with_barrier, const float* x, float* out) {
  return reported(message, [&] { run(1, 64, [&] { rotate(step, with_barrier, x, out); }); });
}
PROBE probe_barrier_for(char* message, int threads) {
  return reported(message, [&] { run(1, 64, [&] { barrier_for(threads); }); });
}
PROBE probe_shuffle_for(char* message, int threads) {
  return reported(message, [&] { run(1, 64, [&] { shuffle_for(threads); }); });
}
PROBE probe_launch(char* message, int blocks, int threads) {
  return reported(message, [&] { run(dim3(1, blocks), threads, [] {}); });
}
PROBE probe_take_shared(char* message) {
  return reported(message, [&] { run(1, 32, [] { take_shared(); }); });
}
PROBE probe_write_at(char* message, int index, float* out) {
  return reported(message, [&] { run(1, 1, [&] { write_at(index, out); }); });
}
PROBE probe_write_shared_at(char* message, int index) {
  return reported(message, [&] { run(1, 1, [&] { write_shared_at(index); }); });
}
PROBE probe_multiply(char* message, int mode, int row_bytes, const void* a, const void* b,
                     float* d) {
  return reported(message,
                  [&] { run(1, 32, [&] { multiply(mode, row_bytes, a, b, d); }, 24 * row_bytes); });
}
PROBE probe_multiply_transposed(char* message, const void* a, const void* b, float* d) {
  return reported(message, [&] { run(1, 32, [&] { multiply_transposed(a, b, d); }, 768); });
}
PROBE probe_copy(char* message, int offset, int wait, const char* from, char* to) {
  return reported(message, [&] { run(1, 1, [&] { copy(offset, wait, from, to); }, 32); });
}
PROBE probe_ask_shared(char* message, int bytes) {
  return reported(message, [&] { run(1, 1, [] {}, bytes); });
}
