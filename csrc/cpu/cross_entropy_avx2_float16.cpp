#define FASTCLS_DTYPE Half
#include "cpu/cross_entropy_avx2.h"
