// The conv-block kernels for AVX-512 (F, BW, DQ, VL) with BF16, which serve bfloat16 alone.
#include "cpu/conv_block_fast.h"
#include "cpu/scratch.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include <immintrin.h>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,popcnt")
#define FASTCLS_AVX512
#define FASTCLS_AVX512_BF16

namespace fastcls::cpu::avx512_bf16 {
#include "cpu/vec.h"
#include "cpu/vec_transpose.h"
#include "cpu/conv_block_kernels.h"
}  // namespace fastcls::cpu::avx512_bf16

#pragma GCC pop_options

#endif
