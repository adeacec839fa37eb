// Remove columns one by one, each time the cheapest. kernels/cheapest_removals.py has the formulas; this is the same
// algorithm, with rows read from the core's cache.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"

namespace gradprune {

// inverse, gram: [columns, columns], symmetric, A^-1 and M = W^T W. The strides are between rows, in elements.
struct RemovalInputs {
  const double* inverse;
  std::ptrdiff_t inverse_stride;
  const double* gram;
  std::ptrdiff_t gram_stride;
  std::ptrdiff_t columns;
};

// taken, costs: [count], the removed columns in order, and the cost of each after the removals before it. Ties are
// broken by the lower index. Runs on the calling thread, in a fixed order; its scratch memory, about 16 * count *
// columns bytes, is kept for the next call.
void cheapest_removals(const RemovalInputs& inputs, std::ptrdiff_t count, std::int64_t* taken, double* costs, Isa isa);

}  // namespace gradprune
