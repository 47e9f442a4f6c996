// Checks of op arguments and their messages, shared by CPU and CUDA.
// A message names operation, argument, what was expected and what came. The exception types are
// those that PyTorch raises for the same mistake: RuntimeError unless said otherwise.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace fastcls {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Args>
std::string message(const Args&... args) {
  std::ostringstream text;
  ((text << args), ...);
  return text.str();
}

#define FASTCLS_CHECK(condition, ...)                                          \
  do {                                                                         \
    if (!(condition)) throw std::runtime_error(fastcls::message(__VA_ARGS__)); \
  } while (0)

inline std::string shape_string(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t d = 0; d < sizes.size(); ++d) text << (d ? ", " : "") << sizes[d];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string shape_string(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

inline bool is_half(ScalarType type) {
  return type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& like,
                              const char* like_name) {
  FASTCLS_CHECK(t.device() == like.device(), op, ": ", name, " must be on the device of ",
                like_name, " (", like.is_cpu() ? "cpu" : "cuda:",
                like.is_cpu() ? "" : std::to_string(like.get_device_index()), "), got ",
                t.is_cpu()    ? "cpu"
                : t.is_cuda() ? "cuda:"
                              : "another device type",
                t.is_cuda() ? std::to_string(t.get_device_index()) : "");
}

}  // namespace fastcls
