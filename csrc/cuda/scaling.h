// The elements of a chunk that one thread scales. Runs on the host too, for tests.
#pragma once

#include "cuda/chunk.h"

namespace gradprune {

// g <- g * factor, in T, rounded to nearest even.
template <class T>
struct Scaling {
  T factor;

  template <class E, int N>
  GRADPRUNE_HOST_DEVICE void operator()(Lanes<E, N> lanes, E* at) const {
    for (int k = 0; k < N; ++k) narrow(widen(lanes.lane[k]) * factor, lanes.lane[k]);
    lanes.template store<true>(at);
  }
};

// The elements before the first aligned vector go to the first threads, one each; the others are aligned.
GRADPRUNE_HOST_DEVICE void scale_of_thread(const Chunk& chunk, double scale, int thread) {
  with_elements(chunk, [&](auto* first) {
    using T = decltype(widen(*first));
    const Scaling<T> scaling{static_cast<T>(scale)};
    const std::int64_t head = elements_before_boundary(first, chunk.count);
    if (thread < head) scaling(Lanes<std::remove_pointer_t<decltype(first)>, 1>{{first[thread]}}, first + thread);
    for_each_of_thread<true>(first + head, chunk.count - head, thread, scaling);
  });
}

}  // namespace gradprune
