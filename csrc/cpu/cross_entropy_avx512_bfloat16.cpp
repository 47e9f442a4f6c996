#define FASTCLS_DTYPE BFloat16
#include "cpu/cross_entropy_avx512.h"
