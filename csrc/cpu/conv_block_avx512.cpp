// The conv-block kernels for AVX-512 (F, BW, DQ, VL).
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
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")
#define FASTCLS_AVX512

namespace fastcls::cpu::avx512 {
#include "cpu/vec.h"
#include "cpu/vec_transpose.h"
#include "cpu/conv_block_kernels.h"
}  // namespace fastcls::cpu::avx512

#pragma GCC pop_options

#endif
