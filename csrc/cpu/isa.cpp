#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastcls::cpu {

namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::kAvx512Bf16:
      return supported(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::kScalar;
}

// Is it the best choice where it is supported? Intel's processors multiply pairs more slowly than
// floats (github.com/libxsmm/tpp-mlir/pull/1025).
bool pays(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Bf16) return __builtin_cpu_is("amd");
#endif
  return true;
}

Isa choose() {
  constexpr Isa kBestFirst[] = {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kScalar};
  const char* wanted = std::getenv("FASTCLS_ISA");
  for (Isa isa : kBestFirst) {
    if (wanted == nullptr || *wanted == '\0') {
      if (supported(isa) && pays(isa)) return isa;
    } else if (std::string(wanted) == isa_name(isa)) {
      if (supported(isa)) return isa;
      throw std::runtime_error(std::string("FASTCLS_ISA: this CPU does not support ") + wanted);
    }
  }
  throw std::runtime_error(
      std::string("FASTCLS_ISA: expected scalar, avx2, avx512 or avx512_bf16, got ") + wanted);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "scalar";
  }
}

}  // namespace fastcls::cpu
