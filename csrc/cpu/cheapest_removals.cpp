#include "cpu/cheapest_removals.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/kernel_table.h"
#include "cpu/scratch.h"
#include "cpu/tile_sums.h"

namespace gradprune {
namespace {

struct RemovalScratch;

// Rows are padded with zeros to a multiple of this many doubles, the length of the longest vector.
constexpr std::ptrdiff_t kLanes = 8;

}  // namespace

void cheapest_removals(const RemovalInputs& inputs, std::ptrdiff_t count, std::int64_t* taken, double* costs, Isa isa) {
  const RemovalKernel kernel = kernels(isa).removal;
  const std::ptrdiff_t columns = inputs.columns, width = divide_up(columns, kLanes) * kLanes;
  // The rows s and d of all removals, and the diagonals of A^-1 and of M.
  double* s = reinterpret_cast<double*>(scratch<RemovalScratch>((2 * count + 2) * width * sizeof(double)));
  double *d = s + count * width, *inverse = d + count * width, *gram = inverse + width;
  std::fill(inverse, inverse + 2 * width, 0.0);
  for (std::ptrdiff_t j = 0; j < columns; ++j) {
    inverse[j] = inputs.inverse[j * (inputs.inverse_stride + 1)];
    gram[j] = inputs.gram[j * (inputs.gram_stride + 1)];
  }
  std::vector<char> gone(columns);
  for (std::ptrdiff_t step = 0; step < count; ++step) {
    std::ptrdiff_t cheapest = -1;
    double least = std::numeric_limits<double>::infinity();
    for (std::ptrdiff_t j = 0; j < columns; ++j) {
      if (gone[j]) continue;
      const double cost = std::max(gram[j] / inverse[j], 0.0);
      if (cheapest >= 0 && !(cost < least)) continue;
      cheapest = j;
      least = cost;
    }
    taken[step] = cheapest;
    costs[step] = least;
    gone[cheapest] = 1;
    double *own = s + step * width, *change = d + step * width;
    std::copy_n(inputs.inverse + cheapest * inputs.inverse_stride, columns, own);
    std::copy_n(inputs.gram + cheapest * inputs.gram_stride, columns, change);
    std::fill(own + columns, own + width, 0.0);
    std::fill(change + columns, change + width, 0.0);
    kernel({s, d, step, width, cheapest, inverse, gram});
  }
}

}  // namespace gradprune
