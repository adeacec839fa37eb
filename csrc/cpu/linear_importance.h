// taylor_score of a linear layer's weight gradients, which are never written to memory.
#pragma once

#include <cstddef>

#include "cpu/taylor_score.h"

namespace gradprune {

// [samples, tokens, width] with unit stride along the width.
struct Activations {
  const void* data;
  std::ptrdiff_t sample_stride, token_stride;  // in elements
  ElementType type;
};

struct LinearShape {
  std::ptrdiff_t samples, tokens, rows, columns;
};

// taylor_score of W and each sample's G = dY^T X, summed over samples. x: [samples, tokens, columns], dy: [samples,
// tokens, rows], w: [rows, columns]; all fp64, or none.
//
// A tile of G is computed in fp32 (fp64 for fp64) and scored while it is in the core's own cache. Sums as taylor_score's.
// Deterministic for any number of threads.
void linear_importance(const Activations& x, const Activations& dy, const Matrix& w, const LinearShape& shape,
                       const TaylorOutputs& outputs, int threads, Isa isa);

}  // namespace gradprune
