// taylor_score of each sample's weight gradient G = dY^T X of a linear layer. Gradients are never stored as a whole.
//
// For each sample, X and dY are packed into panels once, in fp32 (fp64 for fp64). Then threads take tiles of G: one
// computes a tile in registers and a buffer that stays in its core's cache (gradient_tile_kernel.h), scores it there
// (taylor_score_kernel.h), and writes the tile's row and column sums and statistics to a place of their own. After each
// sample these are added to the totals in fp64 and in order, so results have the same bits for any number of threads.
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

// taylor_score of W and each sample's G, summed over samples. x: [samples, tokens, columns], dy: [samples, tokens,
// rows], w: [rows, columns]; all are fp64, or none is. G is computed in fp32 (fp64 for fp64). Sums within a tile are
// formed in the same type, sums over tiles and samples in fp64. Deterministic for any number of threads.
void linear_importance(const Activations& x, const Activations& dy, const Matrix& w, const LinearShape& shape,
                       const TaylorOutputs& outputs, int threads, Isa isa);

struct GroupedShape {
  std::ptrdiff_t experts, samples, rows, columns;
};

// linear_importance of each expert's W on the tokens that the expert sees. x: [tokens of all experts, columns], dy:
// [tokens of all experts, rows]; their sample strides are not used. w: the first expert's weight; that of the next
// expert starts w_expert_stride elements later, and so on. offsets: [experts * samples + 1]; the tokens of sample n
// that expert e sees start at offsets[e * samples + n] and end before the next offset. outputs: row [experts, kScores,
// rows], column [experts, kScores, columns], statistics [experts, kStatistics]; row[s] and column[s] point at score s
// of the first expert.
void grouped_linear_importance(const Activations& x, const Activations& dy, const Matrix& w,
                               std::ptrdiff_t w_expert_stride, const std::int64_t* offsets, const GroupedShape& shape,
                               const TaylorOutputs& outputs, int threads, Isa isa);

}  // namespace gradprune
