// Host functions behind the ops. cpu/ and cuda/ define the same set, each in its namespace.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

#define FASTCLS_DECLARE_OPS                                                                     \
  std::tuple<Tensor, Tensor> conv_block_forward(                                                \
      const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,             \
      std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, \
      int64_t groups, bool relu, std::vector<int64_t> pool_size,                                \
      std::vector<int64_t> pool_stride, std::vector<int64_t> pool_padding, bool ceil_mode,      \
      bool save_winner);                                                                        \
  std::tuple<Tensor, Tensor, Tensor> conv_block_backward(                                       \
      const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& winner,  \
      std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, \
      int64_t groups, bool relu, std::vector<int64_t> pool_size,                                \
      std::vector<int64_t> pool_stride, std::vector<int64_t> pool_padding, bool ceil_mode,      \
      bool need_input, bool need_weight, bool need_bias);

namespace fastcls::cpu {
FASTCLS_DECLARE_OPS
}
namespace fastcls::cuda {
FASTCLS_DECLARE_OPS
}
