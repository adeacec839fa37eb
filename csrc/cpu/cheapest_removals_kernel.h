// One removal of `cheapest_removals`, see Removal in kernel_table.h. Internal linkage, see vector.h.
#pragma once

#include <cmath>

#include "cpu/kernel_table.h"
#include "cpu/vector.h"

namespace gradprune {
namespace {

// Brings a row of A^-1 (own) and of M (change) up to date with ROWS earlier removals, the first of which is number
// `first`. Each of both rows is loaded and stored once for all ROWS of them.
template <int N, int ROWS>
GRADPRUNE_INLINE void subtract_rows(const Removal& removal, std::ptrdiff_t first, double* own, double* change) {
  using V = Vector<double, N>;
  const std::ptrdiff_t width = removal.width;
  const double* s = removal.s + first * width;
  const double* d = removal.d + first * width;
  V s_at[ROWS], d_at[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    s_at[r] = V::broadcast(-s[r * width + removal.column]);
    d_at[r] = V::broadcast(-d[r * width + removal.column]);
  }
  for (std::ptrdiff_t j = 0; j < width; j += N) {
    V a = V::load(own + j), m = V::load(change + j);
    for (int r = 0; r < ROWS; ++r) {
      const V s_row = V::load(s + r * width + j), d_row = V::load(d + r * width + j);
      a = multiply_add(s_at[r], s_row, a);
      m = multiply_add(s_at[r], d_row, m);
      m = multiply_add(d_at[r], s_row, m);
    }
    a.store(own + j);
    m.store(change + j);
  }
}

template <int BYTES>
void removal(const Removal& removal) {
  constexpr int N = BYTES / 8, kRows = 4;
  using V = Vector<double, N>;
  double* own = removal.s + removal.done * removal.width;
  double* change = removal.d + removal.done * removal.width;
  std::ptrdiff_t row = 0;
  for (; row + kRows <= removal.done; row += kRows) subtract_rows<N, kRows>(removal, row, own, change);
  for (; row < removal.done; ++row) subtract_rows<N, 1>(removal, row, own, change);

  const double scale = 1.0 / std::sqrt(own[removal.column]);
  const V scales = V::broadcast(scale), half = V::broadcast(-0.5 * change[removal.column] * scale * scale);
  const V minus_one = V::broadcast(-1.0), minus_two = V::broadcast(-2.0);
  for (std::ptrdiff_t j = 0; j < removal.width; j += N) {
    const V s = V::load(own + j) * scales;
    const V d = multiply_add(half, s, V::load(change + j) * scales);
    s.store(own + j);
    d.store(change + j);
    multiply_add(minus_one * s, s, V::load(removal.inverse + j)).store(removal.inverse + j);
    multiply_add(minus_two * s, d, V::load(removal.gram + j)).store(removal.gram + j);
  }
}

}  // namespace
}  // namespace gradprune
