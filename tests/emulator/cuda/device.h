// The names of csrc/cuda/device.h for g++: CUDA kernels run on the host, one block after the other,
// a block's threads as fibres (see emulator.cpp). This file stands before the real one on the
// include path, so that kernels compile unchanged. Only what our kernels use is here.
//
// What it reports, as an exception out of the launch: a barrier or warp function that not all
// threads reach, a launch that no device would take, too much shared memory. What it makes visible:
// shared memory starts as NaN, threads run in turns as long as they can (upwards in one block,
// downwards in the next), so that a missing barrier changes numbers; under AddressSanitizer each
// shared array and each tensor ends in a red zone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs. Blocks are one-dimensional: threadIdx.y and z stay 0.
inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), blockDim, gridDim;

namespace fastcls::emulator {

// Runs kernel() for every thread of the grid; throws std::runtime_error for the faults above.
void run(dim3 grid, int threads, const std::function<void()>& kernel);

void sync_block();
void sync_warp();
// Memory of the block that belongs to a declaration (`site`), the same for all its threads.
void* shared_array(const void* site, size_t bytes);
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

}  // namespace fastcls::emulator

namespace fastcls::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

}  // namespace fastcls::cuda

#define SHARED_ARRAY(type, name, count)              \
  static const char name##_site = 0;                 \
  type(&name)[count] = *static_cast<type(*)[count]>( \
      fastcls::emulator::shared_array(&name##_site, sizeof(type[count])))

inline void __syncthreads() { fastcls::emulator::sync_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { fastcls::emulator::sync_warp(); }

// Shuffles stay within groups of `width` lanes; a source outside the group is the lane itself.
template <typename T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  const int lane = threadIdx.x % 32, first = lane / width * width;
  return fastcls::emulator::from_lane(value, first + source % width);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta, int width = 32) {
  const int lane = threadIdx.x % 32, source = lane % width + static_cast<int>(delta);
  return fastcls::emulator::from_lane(value,
                                      source < width ? lane + static_cast<int>(delta) : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
  const int lane = threadIdx.x % 32, source = lane ^ mask;
  return fastcls::emulator::from_lane(value, source / width <= lane / width ? source : lane);
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  const uint64_t* votes = fastcls::emulator::exchange(predicate != 0);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == 0xffffffffu;
}
