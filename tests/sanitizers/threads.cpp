// PyTorch's parallel_for on std::thread, which ThreadSanitizer understands.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
}

// Always on more than one thread where there is more than one unit, whatever the grain size.
extern "C" AOTI_TORCH_EXPORT AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t,
                                                               ParallelFunc func, void* ctx) {
  const int64_t chunk = (end - begin + kThreads - 1) / kThreads;
  std::atomic<bool> failed = false;
  std::vector<std::thread> threads;
  for (int64_t b = begin; b < end; b += chunk)
    threads.emplace_back([&, b] {
      try {
        func(b, std::min(b + chunk, end), ctx);
      } catch (...) {
        failed = true;
      }
    });
  for (std::thread& thread : threads) thread.join();
  return failed ? AOTI_TORCH_FAILURE : AOTI_TORCH_SUCCESS;
}
