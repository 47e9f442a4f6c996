// Host functions behind the ops. cpu/ and cuda/ define the same set, each in its namespace.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

namespace fastcls {

// The kernel that serves a conv block, as op conv_block_path tells it.
enum class ConvBlockPath : int64_t { kGeneral = 0, kDirect = 1, kWinograd = 2, kGemm = 3 };

}  // namespace fastcls

#define FASTCLS_DECLARE_OPS                                                                        \
  int64_t conv_block_path(const Tensor& input, const Tensor& weight, std::vector<int64_t> stride,  \
                          std::vector<int64_t> padding, std::vector<int64_t> dilation,             \
                          int64_t groups, bool relu, std::vector<int64_t> pool_size,               \
                          std::vector<int64_t> pool_stride, std::vector<int64_t> pool_padding,     \
                          bool ceil_mode, bool allow_tf32);                                        \
  std::tuple<Tensor, Tensor> conv_block_forward(                                                   \
      const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,                \
      std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,    \
      int64_t groups, bool relu, std::vector<int64_t> pool_size, std::vector<int64_t> pool_stride, \
      std::vector<int64_t> pool_padding, bool ceil_mode, bool save_winner, bool allow_tf32);       \
  std::tuple<Tensor, Tensor, Tensor> conv_block_backward(                                          \
      const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& winner,     \
      std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,    \
      int64_t groups, bool relu, std::vector<int64_t> pool_size, std::vector<int64_t> pool_stride, \
      std::vector<int64_t> pool_padding, bool ceil_mode, bool need_input, bool need_weight,        \
      bool need_bias, bool allow_tf32);                                                            \
  std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(                                        \
      const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,              \
      int64_t ignore_index, int64_t reduction, double label_smoothing, bool float_loss,            \
      int64_t save, bool count_hits);                                                              \
  Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& input,                      \
                                const Tensor& target, const std::optional<Tensor>& weight,         \
                                const Tensor& saved, int64_t ignore_index, int64_t reduction,      \
                                double label_smoothing);                                           \
  void cross_entropy_scale(const Tensor& grad, const Tensor& grad_loss, const Tensor& target,      \
                           int64_t ignore_index);

namespace fastcls::cpu {
FASTCLS_DECLARE_OPS
}
namespace fastcls::cuda {
FASTCLS_DECLARE_OPS
}
