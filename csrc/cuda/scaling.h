// How one thread scales its elements of a chunk. Also compiles for the host, for tests.
#pragma once

#include "cuda/chunk.h"

namespace gradprune {

// g <- g * factor, computed in T and rounded to nearest even.
template <class T>
struct Scaling {
  T factor;

  template <class E, int N>
  GRADPRUNE_HOST_DEVICE void operator()(Lanes<E, N> lanes, E* at) const {
    for (int k = 0; k < N; ++k) narrow(widen(lanes.lane[k]) * factor, lanes.lane[k]);
    lanes.template store<true>(at);
  }
};

// Each of the elements before the first aligned vector is scaled by a thread of its own. The rest is aligned, so that
// every access fills a vector.
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
