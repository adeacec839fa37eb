// Statistics of a gradient, computed in vector lanes. Internal linkage, see vector.h.
#pragma once

#include "cpu/element_io.h"
#include "gradient_statistics.h"

namespace gradprune {
namespace {

// Statistics of elements that are assumed to be finite. If one is not, or if the sum overflows, sum_abs is not finite
// either, and the caller starts again with `masked_statistics`: so the common case tests no element.
template <class V>
struct FiniteStatistics {
  V sum_abs = V::zero();
  V sum_square = V::zero();
  V max_abs = V::zero();
  V min_abs = V{bit_cast<typename V::Value>(typename V::Mask{} + Bits<typename V::T>::kInfinity)};

  // The vectors are combined first, so that a call makes each chain of dependent additions only one longer.
  template <int VECTORS>
  GRADPRUNE_INLINE void add(const V (&g)[VECTORS]) {
    V total = abs(g[0]), largest = total, smallest = total, square = g[0] * g[0];
    for (int k = 1; k < VECTORS; ++k) {
      const V magnitude = abs(g[k]);
      total = total + magnitude;
      largest = larger(largest, magnitude);
      smallest = smaller(smallest, magnitude);
      square = multiply_add(g[k], g[k], square);
    }
    sum_abs = sum_abs + total;
    sum_square = sum_square + square;
    max_abs = larger(max_abs, largest);
    min_abs = smaller(min_abs, smallest);
  }

  GRADPRUNE_INLINE Statistics reduced() const {
    return {reduce(sum_abs, Add{}), reduce(sum_square, Add{}), reduce(max_abs, Larger{}), reduce(min_abs, Smaller{}),
            0.0};
  }
};

// Statistics of runs of elements: whole vectors are added to `wide`, the elements left over to `narrow`.
template <class T, int N>
struct RunStatistics {
  FiniteStatistics<Vector<T, N>> wide;
  FiniteStatistics<Vector<T, 1>> narrow;

  template <class E>
  GRADPRUNE_INLINE void add(const E* g, std::ptrdiff_t count) {
    constexpr int kVectors = 4;
    std::ptrdiff_t i = 0;
    for (; i + kVectors * N <= count; i += kVectors * N) {
      Vector<T, N> x[kVectors];
      for (int k = 0; k < kVectors; ++k) x[k] = load_unordered<N>(g + i + k / 2 * 2 * N, k % 2);
      wide.add(x);
    }
    for (; i < count; ++i) {
      const Vector<T, 1> x[1] = {load_elements<1>(g + i)};
      narrow.add(x);
    }
  }

  // If all elements were finite, merges their statistics into `into` and returns true. Bits are compared, because the
  // compiler may assume that there is no NaN.
  GRADPRUNE_INLINE bool merge_if_finite(Statistics& into) const {
    const T sum_abs = reduce(wide.sum_abs, Add{}) + narrow.sum_abs.value[0];
    if (bit_cast<typename Bits<T>::Int>(sum_abs) >= Bits<T>::kInfinity) return false;
    merge(into, wide.reduced());
    merge(into, narrow.reduced());
    return true;
  }
};

// The rare case: g has non-finite elements, which are counted and left out. Sums are formed in double.
template <class E>
__attribute__((noinline)) void masked_statistics(const E* g, std::ptrdiff_t count, Statistics& into) {
  using V = Vector<typename Accumulation<E>::type, 1>;
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    const V magnitude = abs(load_elements<1>(g + i));
    const double x = magnitude.value[0];
    if (is_finite(magnitude)[0]) {
      const V square = magnitude * magnitude;
      merge(into, {x, square.value[0], x, x, 0.0});
    } else {
      into.non_finite += 1.0;
    }
  }
}

}  // namespace
}  // namespace gradprune
