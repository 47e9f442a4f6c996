// The names of csrc/cuda/common.h for the emulator: a launch runs at once, on the host.
#pragma once

#include <cstdlib>

#include "cuda/device.h"
#include "ops.h"

namespace fastcls::cuda {

class Launcher {
 public:
  explicit Launcher(const Tensor&) {}

  template <typename... Params, typename... Args>
  void operator()(void (*kernel)(Params...), dim3 grid, int threads, const Args&... args) const {
    with_shared(0, kernel, grid, threads, args...);
  }

  template <typename... Params, typename... Args>
  void with_shared(int64_t shared_bytes, void (*kernel)(Params...), dim3 grid, int threads,
                   const Args&... args) const {
    emulator::run(grid, threads, [&] { kernel(args...); }, shared_bytes);
  }

  // Every other launch goes without.
  unsigned* counter() const {
    static unsigned counter = 0, calls = 0;
    if (counter != 0) throw std::runtime_error("emulator: a kernel left its counter at a number");
    return ++calls % 2 ? &counter : nullptr;
  }

  // A small device: few multiprocessors, so that blocks get several turns. It has matrix units,
  // unless the environment wants one of compute capability 7.5.
  int arch() const {
    const char* const arch = std::getenv("FASTCLS_EMULATED_ARCH");
    return arch ? std::atoi(arch) : 80;
  }
  int multiprocessors() const { return 2; }
  int64_t max_shared_bytes() const { return 99 << 10; }
};

}  // namespace fastcls::cuda
