// Memory that the kernels of the conv block fill before they read it.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/huge_pages.h"

namespace fastcls::cpu {

// Aligned to a cache line, with room for vectors read past the end, up to four of AVX-512 and 64
// elements. What was not written means nothing: sums over it are dropped.
template <typename E>
struct Scratch {
  std::unique_ptr<E[]> memory;
  E* data = nullptr;
  void reserve(int64_t n) {
    constexpr int64_t kLine = 64, kVectors = 4 * 64;
    memory.reset(new E[n + (kLine + kVectors) / sizeof(E) + 64]);
    ask_for_huge_pages(memory.get(), n * sizeof(E));
    data = reinterpret_cast<E*>((reinterpret_cast<uintptr_t>(memory.get()) + kLine - 1) &
                                ~uintptr_t{kLine - 1});
  }
};

}  // namespace fastcls::cpu
