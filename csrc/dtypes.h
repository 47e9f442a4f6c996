// From the dtypes of tensors to C++ types, for every op on every device.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"

namespace fastcls {

// Of the arithmetic.
inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(T, W, Acc) with values of the C++ types, for the dtypes that the checks let through: T of
// the op's input; W of its second floating tensor, T or float with a half T; Acc of the arithmetic.
template <typename F>
void dispatch_types(ScalarType input, ScalarType second, const F& f) {
  using BFloat16 = torch::headeronly::BFloat16;
  using Half = torch::headeronly::Half;
  const bool mixed = input != second;
  if (input == ScalarType::Double) return f(double{}, double{}, double{});
  if (input == ScalarType::Float) return f(float{}, float{}, float{});
  if (input == ScalarType::BFloat16)
    return mixed ? f(BFloat16{}, float{}, float{}) : f(BFloat16{}, BFloat16{}, float{});
  return mixed ? f(Half{}, float{}, float{}) : f(Half{}, Half{}, float{});
}

}  // namespace fastcls
