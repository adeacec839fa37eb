// Row and column sums of |w g| and of (w g)^2 for a weight and its gradient, and the gradient's statistics.
#pragma once

#include <cstddef>

#include "cpu/tile_sums.h"

namespace gradprune {

// Whether W and G of these types can be scored together: both are fp64, or neither is.
bool taylor_score_supports(ElementType w, ElementType g);

// The sums of taylor_score_kernel.h, of the sides that outputs.side asks for, over all of W and G [rows, columns], each
// read once. Threads take tiles of at most 120 x 4096 elements. Sums within a tile are formed in fp32 (fp64 for fp64),
// sums over tiles in fp64. Deterministic for any number of threads, because tiles depend only on the shape and their
// sums are added in order.
void taylor_score(const Matrix& w, const Matrix& g, std::ptrdiff_t rows, std::ptrdiff_t columns,
                  const TaylorOutputs& outputs, int threads, Isa isa);

}  // namespace gradprune
