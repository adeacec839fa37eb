// A parallel loop; it runs on one thread if the build has no OpenMP.
#pragma once

#include <cstddef>

namespace gradprune {

// Calls body(i) for i in [0, count), on at most `threads` threads. Results must not depend on which thread runs which
// i: every i writes its own output, and sums over i are formed afterwards, in order. This allows schedule(dynamic), by
// which a thread that shares its core with another process takes fewer values of i instead of delaying the other
// threads.
template <class Body>
void parallel_for(std::ptrdiff_t count, int threads, const Body& body) {
  const int team = static_cast<int>(count < threads ? count : threads);
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(team) if (team > 1)
#else
  (void)team;
#endif
  for (std::ptrdiff_t i = 0; i < count; ++i) body(i);
}

}  // namespace gradprune
