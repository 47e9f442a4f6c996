// Huge pages for large memory.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "checks.h"

namespace fastcls::cpu {

// Asks for huge pages under memory that is about to be filled. The allocator maps fresh memory for
// large sizes in every call, whose pages of 4 KiB come one fault at a time, which takes longer than
// to fill them. A page of 2 MiB is one fault. Only whole ones inside the tensor are
// asked for, so that no memory is taken beyond it; where the system knows no such pages nothing
// happens.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t end = (begin + bytes) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// A new tensor, with huge pages.
inline Tensor with_huge_pages(Tensor t) {
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  ask_for_huge_pages(t.mutable_data_ptr(), bytes);
  return t;
}

}  // namespace fastcls::cpu
