// Row and column sums of a weight times its gradient, and the gradient's statistics.
#pragma once

#include <cstddef>

#include "cpu/tile_sums.h"

namespace gradprune {

// A matrix [rows, columns] with unit stride along a row.
struct Matrix {
  const void* data;
  std::ptrdiff_t stride;  // between rows, in elements
  ElementType type;
};

// True if W and G of these types can be scored together: both fp64, or neither.
bool taylor_score_supports(ElementType w, ElementType g);

// The sums of taylor_score_kernel.h over the whole of W and G, each read once.
// Sums within a tile in fp32 (fp64 for fp64), over tiles in fp64. Deterministic for any number of threads: tiles
// depend on the shape alone, and their sums are combined in order.
void taylor_score(const Matrix& w, const Matrix& g, std::ptrdiff_t rows, std::ptrdiff_t columns,
                  const TaylorOutputs& outputs, int threads, Isa isa);

}  // namespace gradprune
