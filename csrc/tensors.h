// New tensors, on the device of another one.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"

namespace fastcls {

// True where PyTorch's suggest_memory_format says channels-last: strides ordered N, H, W, C, with
// the ambiguous cases (one channel, one pixel) counted as contiguous.
inline bool suggests_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    if (d == 0 && least == t.stride(1)) return false;
    least = t.stride(d) * (t.size(d) > 1 ? t.size(d) : 1);
  }
  return true;
}

// Under the emulator new memory is NaN, or -1: what a kernel leaves unwritten shows.
inline Tensor poisoned(Tensor t) {
#ifdef FASTCLS_POISON
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0xff, t.numel() * t.element_size());
#endif
  return t;
}

// A new tensor on the device of `like`. Much faster than torch::stable::empty, which looks its op
// up by name in every call.
inline Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                            ScalarType dtype, const Tensor& like) {
  using torch::stable::detail::from;
  const auto code = torch::stable::detail::to<int32_t>(from(dtype));
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(dims, sizes, strides, code, device_type, device_index, &handle) != 0)
    throw std::runtime_error(message("not enough memory for a tensor of shape ",
                                     shape_string(std::vector<int64_t>(sizes, sizes + dims)), ", ",
                                     torch::headeronly::toString(dtype)));
  return poisoned(Tensor(handle));
}

// A new tensor [N, C, H, W] in the memory format that `like` suggests.
inline Tensor empty_4d(int64_t N, int64_t C, int64_t H, int64_t W, ScalarType dtype,
                       const Tensor& like) {
  const int64_t sizes[] = {N, C, H, W};
  // PyTorch counts an empty dimension as 1 here.
  C = std::max<int64_t>(C, 1), H = std::max<int64_t>(H, 1), W = std::max<int64_t>(W, 1);
  const int64_t contiguous[] = {C * H * W, H * W, W, 1};
  const int64_t channels_last[] = {H * W * C, 1, W * C, C};
  return empty_strided(4, sizes, suggests_channels_last(like) ? channels_last : contiguous, dtype,
                       like);
}

inline Tensor empty_flat(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t numel = 1;
  for (size_t d = sizes.size(); d-- > 0; numel *= std::max<int64_t>(sizes[d], 1))
    strides[d] = numel;
  return empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, like);
}

// A new tensor of t's shape, dtype and memory format.
inline Tensor new_like(const Tensor& t) {
  if (!t.is_contiguous()) return poisoned(torch::stable::empty_like(t));
  return empty_strided(t.dim(), t.sizes().data(), t.strides().data(), t.scalar_type(), t);
}

// What an op returns in the place of an output that was not asked for: None in Python.
inline Tensor no_tensor() {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&handle));
  return Tensor(handle);
}

}  // namespace fastcls
