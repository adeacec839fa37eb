// What one thread adds to a chunk's statistics, and how threads' parts are combined. Runs on the host too, for tests.
#pragma once

#include <cmath>

#include "cpu/kernel_table.h"
#include "cuda/chunk.h"

namespace gradprune {

// [kStatistics] in the order of Statistic; over no elements: 0, 0, 0, infinity, 0.
struct Statistics {
  double value[kStatistics];
};

GRADPRUNE_HOST_DEVICE Statistics no_statistics() { return {{0.0, 0.0, 0.0, INFINITY, 0.0}}; }

GRADPRUNE_HOST_DEVICE void merge(Statistics& into, const Statistics& from) {
  into.value[kSumAbs] += from.value[kSumAbs];
  into.value[kSumSquare] += from.value[kSumSquare];
  into.value[kMaxAbs] = fmax(into.value[kMaxAbs], from.value[kMaxAbs]);
  into.value[kMinAbs] = fmin(into.value[kMinAbs], from.value[kMinAbs]);
  into.value[kNonFinite] += from.value[kNonFinite];
}

// A thread's elements taken to be finite, summed in T. If one is not, or the sum overflows, sum_abs is not finite.
template <class T>
struct FiniteSums {
  T sum_abs = 0, sum_square = 0, max_abs = 0, min_abs = INFINITY;

  template <class E, int N>
  GRADPRUNE_HOST_DEVICE void operator()(const Lanes<E, N>& lanes, const E*) {
    for (int k = 0; k < N; ++k) {
      const T x = widen(lanes.lane[k]), magnitude = fabs(x);
      sum_abs += magnitude;
      sum_square = fma(x, x, sum_square);
      max_abs = fmax(max_abs, magnitude);
      min_abs = fmin(min_abs, magnitude);
    }
  }
};

// The rare case: non-finite elements are counted and left out. Squares in T, as above; sums in double.
template <class T>
struct MaskedSums {
  Statistics statistics = no_statistics();

  template <class E, int N>
  GRADPRUNE_HOST_DEVICE void operator()(const Lanes<E, N>& lanes, const E*) {
    for (int k = 0; k < N; ++k) {
      const T magnitude = fabs(widen(lanes.lane[k])), square = magnitude * magnitude;
      if (magnitude < static_cast<T>(INFINITY))
        merge(statistics, {{static_cast<double>(magnitude), static_cast<double>(square),
                            static_cast<double>(magnitude), static_cast<double>(magnitude), 0.0}});
      else
        statistics.value[kNonFinite] += 1.0;
    }
  }
};

template <bool ALIGNED, class E>
GRADPRUNE_HOST_DEVICE Statistics statistics_of_thread(const E* first, std::int64_t count, int thread) {
  using T = decltype(widen(E{}));
  FiniteSums<T> sums;
  for_each_of_thread<ALIGNED>(first, count, thread, sums);
  if (sums.sum_abs < static_cast<T>(INFINITY))
    return {{static_cast<double>(sums.sum_abs), static_cast<double>(sums.sum_square),
             static_cast<double>(sums.max_abs), static_cast<double>(sums.min_abs), 0.0}};
  MaskedSums<T> masked;
  for_each_of_thread<false>(first, count, thread, masked);
  return masked.statistics;
}

// What `thread` has of a chunk. The same bits at any alignment.
GRADPRUNE_HOST_DEVICE Statistics statistics_of_thread(const Chunk& chunk, int thread) {
  Statistics found = no_statistics();
  with_elements(chunk, [&](const auto* first) {
    found = is_aligned(first) ? statistics_of_thread<true>(first, chunk.count, thread)
                              : statistics_of_thread<false>(first, chunk.count, thread);
  });
  return found;
}

// What `thread` has of the parts [first, last) of one gradient.
GRADPRUNE_HOST_DEVICE Statistics merge_of_thread(const Statistics* parts, std::int64_t first, std::int64_t last,
                                                 int thread) {
  Statistics merged = no_statistics();
  for (std::int64_t i = first + thread; i < last; i += kBlockThreads) merge(merged, parts[i]);
  return merged;
}

// One step of the block's tree: after the steps kBlockThreads / 2, ..., 2, 1, parts[0] holds all. A barrier goes
// between steps.
GRADPRUNE_HOST_DEVICE void merge_step(Statistics* parts, int half, int thread) {
  if (thread < half) merge(parts[thread], parts[thread + half]);
}

}  // namespace gradprune
