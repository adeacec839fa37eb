// The gradient of a mask on each input column of a linear layer, and the column's sum of squares, by sample.
#pragma once

#include "cpu/linear_importance.h"

namespace gradprune {

// [samples, columns] each, float, or double if the inputs are double.
struct MaskOutputs {
  void* gradient;  // sum over tokens of x dx
  void* square;    // sum over tokens of x^2
};

// x, dx: [samples, tokens, columns], both of one type; each is read once. Threads take strips of at most 1024 columns
// of one sample. Up to 128 tokens at a time are added in fp32 (fp64 for fp64), and these sums in fp64. One thread
// computes all of a sum, so results are deterministic for any number of threads.
void mask_gradient(const Activations& x, const Activations& dx, std::ptrdiff_t samples, std::ptrdiff_t tokens,
                   std::ptrdiff_t columns, const MaskOutputs& outputs, int threads, Isa isa);

}  // namespace gradprune
