// Every op, its schema and its CPU kernel. The CUDA kernels are registered in cuda/register.cpp.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastcls, m) {
  m.def(
      "conv_block_forward(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, int groups, bool relu, int[] pool_size, int[] pool_stride, "
      "int[] pool_padding, bool ceil_mode, bool save_winner, "
      "bool allow_tf32=False) -> (Tensor out, Tensor winner)");
  m.def(
      "conv_block_backward(Tensor grad_out, Tensor input, Tensor weight, Tensor winner, "
      "int[] stride, int[] padding, int[] dilation, int groups, bool relu, int[] pool_size, "
      "int[] pool_stride, int[] pool_padding, bool ceil_mode, bool need_input, bool need_weight, "
      "bool need_bias, bool allow_tf32=False) -> (Tensor grad_input, Tensor grad_weight, Tensor "
      "grad_bias)");
  m.def(
      "conv_block_path(Tensor input, Tensor weight, int[] stride, int[] padding, int[] dilation, "
      "int groups, bool relu, int[] pool_size, int[] pool_stride, int[] pool_padding, "
      "bool ceil_mode, bool allow_tf32=False) -> int");
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
      "int reduction, float label_smoothing, bool float_loss, int save, bool count_hits) -> "
      "(Tensor loss, Tensor saved, Tensor hits)");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, "
      "Tensor saved, int ignore_index, int reduction, float label_smoothing) -> Tensor grad_input");
  m.def(
      "cross_entropy_scale_(Tensor(a!) grad, Tensor grad_loss, Tensor target, int ignore_index) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(fastcls, CPU, m) {
  m.impl("conv_block_forward", TORCH_BOX(&fastcls::cpu::conv_block_forward));
  m.impl("conv_block_backward", TORCH_BOX(&fastcls::cpu::conv_block_backward));
  m.impl("conv_block_path", TORCH_BOX(&fastcls::cpu::conv_block_path));
  m.impl("cross_entropy_forward", TORCH_BOX(&fastcls::cpu::cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&fastcls::cpu::cross_entropy_backward));
  m.impl("cross_entropy_scale_", TORCH_BOX(&fastcls::cpu::cross_entropy_scale));
}
