// taylor_score of a linear layer's weight gradients, which are never written to memory.
#pragma once

#include <cstddef>
#include <cstdint>

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

struct GroupedShape {
  std::ptrdiff_t experts, samples, rows, columns;
};

// linear_importance of each expert's W on the expert's own tokens. x: [tokens of all experts, columns], dy: [the same,
// rows]; their sample strides are not used. w: the first expert's; the next starts w_expert_stride further, and so on.
// offsets: [experts * samples + 1]; the tokens of sample n that expert e sees start at offsets[e * samples + n] and end
// before the next offset. outputs: expert after expert, row [experts, kScores, rows], column [experts, kScores, columns],
// statistics [experts, kStatistics]; row[s] and column[s] point at the first expert's score s.
void grouped_linear_importance(const Activations& x, const Activations& dy, const Matrix& w,
                               std::ptrdiff_t w_expert_stride, const std::int64_t* offsets, const GroupedShape& shape,
                               const TaylorOutputs& outputs, int threads, Isa isa);

}  // namespace gradprune
