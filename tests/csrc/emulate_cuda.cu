// Emulates the kernels' launches by loops over blocks and threads on the host. The functions, the table and the memory
// layout are those of the kernels.
#include <array>
#include <cstdint>

#include "cuda/scaling.h"
#include "cuda/statistics.h"

using namespace gradprune;

namespace {

template <class OfThread>
Statistics merge_block(OfThread of_thread) {
  std::array<Statistics, kBlockThreads> of_threads;
  for (int thread = 0; thread < kBlockThreads; ++thread) of_threads[thread] = of_thread(thread);
  for (int half = kBlockThreads / 2; half > 0; half /= 2)
    for (int thread = 0; thread < kBlockThreads; ++thread) merge_step(of_threads.data(), half, thread);
  return of_threads[0];
}

}  // namespace

extern "C" void grad_stats(const Chunk* chunks, std::int64_t count, const std::int64_t* first_chunks,
                           std::int64_t gradients, Statistics* of_chunks, Statistics* out) {
  for (std::int64_t i = 0; i < count; ++i)
    of_chunks[i] = merge_block([&](int thread) { return statistics_of_thread(chunks[i], thread); });
  for (std::int64_t k = 0; k < gradients; ++k)
    out[k] = merge_block([&](int thread) {
      return merge_of_thread(of_chunks, first_chunks[k], first_chunks[k + 1], thread);
    });
}

extern "C" void scale_gradients(const Chunk* chunks, std::int64_t count, const double* scales) {
  for (std::int64_t i = 0; i < count; ++i)
    for (int thread = 0; thread < kBlockThreads; ++thread)
      if (scales[chunks[i].index] != 1.0) scale_of_thread(chunks[i], scales[chunks[i].index], thread);
}
