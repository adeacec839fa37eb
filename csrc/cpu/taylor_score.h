// Row and column sums of a weight times its gradient, and the gradient's statistics.
#pragma once

#include <cstddef>

#include "cpu/tile_sums.h"

namespace gradprune {

// True if W and G of these types can be scored together: both fp64, or neither.
bool taylor_score_supports(ElementType w, ElementType g);

// The sums of taylor_score_kernel.h over all of W and G [rows, columns], each read once; those of outputs.side.
// Sums within a tile in fp32 (fp64 for fp64), over tiles in fp64. Deterministic for any number of threads: tiles
// depend on the shape alone, and their sums are combined in order.
void taylor_score(const Matrix& w, const Matrix& g, std::ptrdiff_t rows, std::ptrdiff_t columns,
                  const TaylorOutputs& outputs, int threads, Isa isa);

}  // namespace gradprune
