// The conv-block kernels for AVX2 with FMA and F16C.
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
#pragma GCC target("avx2,fma,f16c,popcnt")
#define FASTCLS_AVX2

namespace fastcls::cpu::avx2 {
#include "cpu/vec.h"
#include "cpu/vec_transpose.h"
#include "cpu/conv_block_kernels.h"
}  // namespace fastcls::cpu::avx2

#pragma GCC pop_options

#endif
