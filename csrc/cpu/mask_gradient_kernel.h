// Sums over tokens of x dx and of x^2 for a strip of columns. Internal linkage, see vector.h.
#pragma once

#include "cpu/element_io.h"
#include "cpu/kernel_table.h"

namespace gradprune {
namespace {

// Adds ROWS tokens to N columns' sums. The tokens' rows are read side by side, so that each sum is loaded and stored
// once for all of them.
template <int N, int ROWS, class E, class T>
GRADPRUNE_INLINE void add_tokens(const E* x, std::ptrdiff_t x_stride, const E* dx, std::ptrdiff_t dx_stride, T* gradient,
                                 T* square) {
  auto g = Vector<T, N>::load(gradient), s = Vector<T, N>::load(square);
  for (int r = 0; r < ROWS; ++r) {
    const Vector<T, N> a = load_elements<N>(x + r * x_stride), b = load_elements<N>(dx + r * dx_stride);
    g = multiply_add(a, b, g);
    s = multiply_add(a, a, s);
  }
  g.store(gradient);
  s.store(square);
}

template <int N, int ROWS, class E, class T>
GRADPRUNE_INLINE void add_rows(const E* x, std::ptrdiff_t x_stride, const E* dx, std::ptrdiff_t dx_stride,
                               std::ptrdiff_t columns, T* gradient, T* square) {
  std::ptrdiff_t c = 0;
  for (; c + N <= columns; c += N) add_tokens<N, ROWS>(x + c, x_stride, dx + c, dx_stride, gradient + c, square + c);
  for (; c < columns; ++c) add_tokens<1, ROWS>(x + c, x_stride, dx + c, dx_stride, gradient + c, square + c);
}

template <class E, int BYTES>
void mask_strip(const MaskStrip& strip) {
  using T = typename Accumulation<E>::type;
  constexpr int N = BYTES / static_cast<int>(sizeof(T)), kRows = 4;
  const E* x = static_cast<const E*>(strip.x);
  const E* dx = static_cast<const E*>(strip.dx);
  for (std::ptrdiff_t first = 0; first < strip.tokens; first += kMaskTokens) {
    const std::ptrdiff_t end = first + kMaskTokens < strip.tokens ? first + kMaskTokens : strip.tokens;
    T gradient[kMaskColumns] = {}, square[kMaskColumns] = {};
    std::ptrdiff_t t = first;
    for (; t + kRows <= end; t += kRows)
      add_rows<N, kRows>(x + t * strip.x_stride, strip.x_stride, dx + t * strip.dx_stride, strip.dx_stride,
                         strip.columns, gradient, square);
    for (; t < end; ++t)
      add_rows<N, 1>(x + t * strip.x_stride, strip.x_stride, dx + t * strip.dx_stride, strip.dx_stride, strip.columns,
                     gradient, square);
    for (std::ptrdiff_t c = 0; c < strip.columns; ++c) {
      strip.gradient[c] += gradient[c];
      strip.square[c] += square[c];
    }
  }
}

}  // namespace
}  // namespace gradprune
