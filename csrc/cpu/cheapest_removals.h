// Columns that are removed one by one, each time the cheapest.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"

namespace gradprune {

// inverse, gram: [columns, columns] with the given strides between rows, A^-1 and M = W^T W; symmetric.
struct RemovalInputs {
  const double* inverse;
  std::ptrdiff_t inverse_stride;
  const double* gram;
  std::ptrdiff_t gram_stride;
  std::ptrdiff_t columns;
};

// taken, costs: [count], which columns go, and what each costs once those before it are gone. Of equal costs the lower
// index goes first. One thread; its scratch memory, 16 * count * columns bytes, is kept for its next call.
void cheapest_removals(const RemovalInputs& inputs, std::ptrdiff_t count, std::int64_t* taken, double* costs, Isa isa);

}  // namespace gradprune
