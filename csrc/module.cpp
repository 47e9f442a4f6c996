// fastcls._C: loading it registers the ops; the functions tell what was built and what runs.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "cross_entropy_call.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastcls CPU kernels and op schemas.";
  m.def(
      "isa", [] { return fastcls::cpu::isa_name(fastcls::cpu::isa()); },
      "Instruction set that the CPU kernels use: scalar, avx2, avx512 or avx512_bf16.");
  fastcls::add_cross_entropy_calls(m.ptr());
  m.attr("cuda_archs") = FASTCLS_CUDA_ARCHS;
  m.attr("compiler") = __VERSION__;
}
