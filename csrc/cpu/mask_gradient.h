// The gradient of a mask on each input column of a linear layer, and the input's sum of squares, by sample.
#pragma once

#include "cpu/linear_importance.h"

namespace gradprune {

// [samples, columns] each, float, or double where the inputs are.
struct MaskOutputs {
  void* gradient;  // sum over tokens of x dx
  void* square;    // sum over tokens of x^2
};

// x, dx: [samples, tokens, columns], of one type. Sums of at most 128 tokens in fp32 (fp64 for fp64), over those in fp64.
// Deterministic for any number of threads.
void mask_gradient(const Activations& x, const Activations& dx, std::ptrdiff_t samples, std::ptrdiff_t tokens,
                   std::ptrdiff_t columns, const MaskOutputs& outputs, int threads, Isa isa);

}  // namespace gradprune
