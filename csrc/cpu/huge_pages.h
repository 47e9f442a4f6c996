// Huge pages for large results.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "checks.h"

namespace fastcls::cpu {

// Asks for huge pages under a new tensor and returns it. The allocator maps fresh memory for a
// large one in every call, whose pages of 4 KiB come one fault at a time: three times as long as it
// takes to fill them. A page of 2 MiB is one fault. Only whole ones inside the tensor are asked
// for, so that no memory is taken beyond it; where the system knows no such pages nothing happens.
inline Tensor with_huge_pages(Tensor t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t end = (begin + bytes) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  return t;
}

}  // namespace fastcls::cpu
