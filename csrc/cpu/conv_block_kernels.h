// Fast kernels of the conv block over Vec. Included once per instruction set, inside its namespace
// and target region (see vec.h).
//
// The inner layout is channels-innermost float: an image band is packed once to zero-padded
// [rows, width, C], after which no kernel looks at borders, strides or dtypes. Vectors run over
// output channels in the forward pass and over a row of taps × input channels, which is one run of
// memory, in the backward passes; but over columns where channels are few (conv_block_columns.h).

#include "cpu/conv_block_operands.h"
#include "cpu/conv_block_pack.h"
#include "cpu/conv_block_direct.h"
#include "cpu/conv_block_columns.h"
#include "cpu/conv_block_winograd.h"
#include "cpu/conv_block_forward.h"
#include "cpu/conv_block_products.h"
#include "cpu/conv_block_backward.h"
#include "cpu/conv_block_backward_weight.h"
#include "cpu/conv_block_backward_input.h"

template <typename T>
ConvBlockKernels<T> conv_block_kernels() {
  return {winograd_serves,
          {packed_weight_floats, packed_weight_blocks, pack_weight},
          {packed_input_floats, packed_input_blocks, pack_input_weight},
          forward<T>,
          backward_weight<T>,
          backward_input<T>};
}
template ConvBlockKernels<BFloat16> conv_block_kernels<BFloat16>();
#if !defined(FASTCLS_AVX512_BF16)
template ConvBlockKernels<float> conv_block_kernels<float>();
template ConvBlockKernels<Half> conv_block_kernels<Half>();
#endif
