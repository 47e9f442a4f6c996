// Small kernels, right and wrong ones, that show what the emulator does. Called through ctypes.
#include "cuda/device.h"

#include <cstdio>
#include <exception>

namespace {

using fastcls::cuda::kFullWarp;
using fastcls::emulator::run;

__global__ void sum_warps(const float* x, float* sums) {
  float sum = x[threadIdx.x];
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(kFullWarp, sum, delta);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
}

__global__ void shuffle(int mode, int argument, int width, const int* x, int* out) {
  const int value = x[threadIdx.x];
  out[threadIdx.x] = mode == 0   ? __shfl_sync(kFullWarp, value, argument, width)
                     : mode == 1 ? __shfl_down_sync(kFullWarp, value, argument, width)
                                 : __shfl_xor_sync(kFullWarp, value, argument, width);
}

__global__ void ballot(const int* x, unsigned* out) {
  out[threadIdx.x] = __ballot_sync(kFullWarp, x[threadIdx.x]);
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
  if (threadIdx.x < threads) __shfl_sync(kFullWarp, 0, 0);
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
PROBE probe_shuffle(char* message, int mode, int argument, int width, const int* x, int* out) {
  return reported(message, [&] { run(1, 32, [&] { shuffle(mode, argument, width, x, out); }); });
}
PROBE probe_ballot(char* message, const int* x, unsigned* out) {
  return reported(message, [&] { run(1, 32, [&] { ballot(x, out); }); });
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
