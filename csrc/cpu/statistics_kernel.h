// Statistics of a gradient, in vector lanes. Internal linkage, as vector.h.
#pragma once

#include "cpu/element_io.h"
#include "cpu/kernel_table.h"

namespace gradprune {
namespace {

// sum|g|, sum g^2, max|g|, min|g| of elements taken to be finite. If one is not, or the sum overflows, sum_abs is
// not finite either: the caller then looks again with `masked_statistics`. So the common case pays for no test.
template <class V>
struct FiniteStatistics {
  V sum_abs = V::zero();
  V sum_square = V::zero();
  V max_abs = V::zero();
  V min_abs = V{bit_cast<typename V::Value>(typename V::Mask{} + Bits<typename V::T>::kInfinity)};

  // The vectors are combined first, so that each chain of dependent additions is one addition a call long.
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
};

inline void merge_statistics(double* into, double sum_abs, double sum_square, double max_abs, double min_abs) {
  into[kSumAbs] += sum_abs;
  into[kSumSquare] += sum_square;
  into[kMaxAbs] = max_abs > into[kMaxAbs] ? max_abs : into[kMaxAbs];
  into[kMinAbs] = min_abs < into[kMinAbs] ? min_abs : into[kMinAbs];
}

template <class V>
GRADPRUNE_INLINE void merge_statistics(double* into, const FiniteStatistics<V>& s) {
  merge_statistics(into, reduce(s.sum_abs, Add{}), reduce(s.sum_square, Add{}), reduce(s.max_abs, Larger{}),
                   reduce(s.min_abs, Smaller{}));
}

// Statistics of runs of elements, as long as they are finite.
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

  // Merges into `into` and returns true if all elements were finite. Compared as bits: a compiler may reason NaN away.
  GRADPRUNE_INLINE bool merge_if_finite(double* into) const {
    const T sum_abs = reduce(wide.sum_abs, Add{}) + narrow.sum_abs.value[0];
    if (bit_cast<typename Bits<T>::Int>(sum_abs) >= Bits<T>::kInfinity) return false;
    merge_statistics(into, wide);
    merge_statistics(into, narrow);
    return true;
  }
};

// The rare case: g holds non-finite elements, which are counted and left out. Sums in double.
template <class E>
__attribute__((noinline)) void masked_statistics(const E* g, std::ptrdiff_t count, double* into) {
  using V = Vector<typename Accumulation<E>::type, 1>;
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    const V magnitude = abs(load_elements<1>(g + i));
    const double x = magnitude.value[0];
    if (is_finite(magnitude)[0]) {
      const V square = magnitude * magnitude;
      merge_statistics(into, x, square.value[0], x, x);
    } else {
      into[kNonFinite] += 1.0;
    }
  }
}

}  // namespace
}  // namespace gradprune
