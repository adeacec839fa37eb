// grad_stats and scale_gradients of one run of consecutive elements. Internal linkage, see vector.h.
#pragma once

#include "cpu/statistics_kernel.h"

namespace gradprune {
namespace {

constexpr std::ptrdiff_t kElementsPerSum = 4096;  // summed in vector lanes before the sum is added to a double

// Merges the statistics of the gradient, [count], into `into`.
template <class E, int BYTES>
void grad_stats(const void* gradient, std::ptrdiff_t count, Statistics& into) {
  using T = typename Accumulation<E>::type;
  const E* g = static_cast<const E*>(gradient);
  while (count > 0) {
    const std::ptrdiff_t size = count < kElementsPerSum ? count : kElementsPerSum;
    RunStatistics<T, BYTES / static_cast<int>(sizeof(T))> statistics;
    statistics.add(g, size);
    if (!statistics.merge_if_finite(into)) masked_statistics(g, size, into);
    g += size;
    count -= size;
  }
}

// g <- g * factor, formed in fp32 (fp64 for fp64 gradients) and rounded to nearest even.
template <class E, int BYTES>
void scale(void* gradient, std::ptrdiff_t count, double factor) {
  using T = typename Accumulation<E>::type;
  constexpr int N = BYTES / static_cast<int>(sizeof(T));
  E* g = static_cast<E*>(gradient);
  const auto wide = Vector<T, N>::broadcast(static_cast<T>(factor));
  const auto narrow = Vector<T, 1>::broadcast(static_cast<T>(factor));
  std::ptrdiff_t i = 0;
  for (; i + N <= count; i += N) store_elements(load_elements<N>(g + i) * wide, g + i);
  for (; i < count; ++i) store_elements(load_elements<1>(g + i) * narrow, g + i);
}

}  // namespace
}  // namespace gradprune
