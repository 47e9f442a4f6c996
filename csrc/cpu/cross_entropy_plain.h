// The commonest cross-entropy, without tensors: class indices, no weight, everything contiguous.
#pragma once

#include <cstdint>

#include <torch/headeronly/core/ScalarType.h>

#include "cross_entropy.h"

namespace fastcls::cpu {

struct PlainCrossEntropy {
  torch::headeronly::ScalarType type;  // of the logits
  int64_t rows, C;
  const void* input;      // [rows, C]
  const int64_t* target;  // [rows]
  int64_t ignore_index;
  Reduction reduction;  // kMean or kSum
  double label_smoothing;
  void* loss;      // one number: float if wide_loss, else of the logits' type
  bool wide_loss;  // true where the logits are float
  void* grad;      // [rows, C] for a gradient of the loss of 1, or null
};

// Throws std::out_of_range for a class that is neither in [0, C) nor ignore_index.
void cross_entropy_plain(const PlainCrossEntropy& call);

}  // namespace fastcls::cpu
