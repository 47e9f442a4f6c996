#define FASTCLS_DTYPE float
#include "cpu/cross_entropy_avx2.h"
