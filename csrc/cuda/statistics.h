// The statistics of one thread's elements of a chunk, and how those of a block's threads are combined. Also compiles
// for the host, for tests.
#pragma once

#include <cmath>

#include "cuda/chunk.h"
#include "gradient_statistics.h"

namespace gradprune {

// The statistics of a thread's elements, which are assumed to be finite, in T. If one is not, or if the sum overflows,
// sum_abs is not finite.
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

// The rare case: non-finite elements are counted and left out. Squares are formed in T as above, and added in double.
template <class T>
struct MaskedSums {
  Statistics statistics = no_statistics();

  template <class E, int N>
  GRADPRUNE_HOST_DEVICE void operator()(const Lanes<E, N>& lanes, const E*) {
    for (int k = 0; k < N; ++k) {
      const T magnitude = fabs(widen(lanes.lane[k])), square = magnitude * magnitude;
      if (magnitude < static_cast<T>(INFINITY))
        merge(statistics, {static_cast<double>(magnitude), static_cast<double>(square),
                           static_cast<double>(magnitude), static_cast<double>(magnitude), 0.0});
      else
        statistics.non_finite += 1.0;
    }
  }
};

template <bool ALIGNED, class E>
GRADPRUNE_HOST_DEVICE Statistics statistics_of_thread(const E* first, std::int64_t count, int thread) {
  using T = decltype(widen(E{}));
  FiniteSums<T> sums;
  for_each_of_thread<ALIGNED>(first, count, thread, sums);
  if (sums.sum_abs < static_cast<T>(INFINITY))
    return {static_cast<double>(sums.sum_abs), static_cast<double>(sums.sum_square),
            static_cast<double>(sums.max_abs), static_cast<double>(sums.min_abs), 0.0};
  MaskedSums<T> masked;
  for_each_of_thread<false>(first, count, thread, masked);
  return masked.statistics;
}

// The statistics of the elements of a chunk that belong to `thread`: the same bits at any alignment.
GRADPRUNE_HOST_DEVICE Statistics statistics_of_thread(const Chunk& chunk, int thread) {
  Statistics found = no_statistics();
  with_elements(chunk, [&](const auto* first) {
    found = is_aligned(first) ? statistics_of_thread<true>(first, chunk.count, thread)
                              : statistics_of_thread<false>(first, chunk.count, thread);
  });
  return found;
}

// The merged statistics of those chunks in [first, last), all of one gradient, that belong to `thread`.
GRADPRUNE_HOST_DEVICE Statistics merge_of_thread(const Statistics* of_chunks, std::int64_t first, std::int64_t last,
                                                 int thread) {
  Statistics merged = no_statistics();
  for (std::int64_t i = first + thread; i < last; i += kBlockThreads) merge(merged, of_chunks[i]);
  return merged;
}

// One step of a tree over the block's threads: after the steps kBlockThreads / 2, ..., 2, 1, with a barrier between
// steps, of_threads[0] holds the statistics of all threads.
GRADPRUNE_HOST_DEVICE void merge_step(Statistics* of_threads, int half, int thread) {
  if (thread < half) merge(of_threads[thread], of_threads[thread + half]);
}

}  // namespace gradprune
