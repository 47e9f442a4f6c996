// The instruction set in use, chosen once per process.
#pragma once

namespace fastcls::cpu {

enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16 };  // each includes those before it

// The best that this CPU has, or the one that FASTCLS_ISA=scalar|avx2|avx512|avx512_bf16 names.
// Throws std::runtime_error if that one is unknown or this CPU lacks it.
Isa isa();

const char* isa_name(Isa isa);

}  // namespace fastcls::cpu
