// Statistics of many gradients, each read once.
#pragma once

#include <vector>

#include "cpu/gradient_run.h"
#include "cpu/kernel_table.h"

namespace gradprune {

// out: one entry per gradient. Runs of 65536 elements are divided among threads. 4096 elements at a time are added in
// fp32 (fp64 for fp64 gradients), and these sums in fp64. Runs do not depend on the number of threads and are merged in
// order, so results have the same bits for any number.
void grad_stats(const std::vector<Gradient>& gradients, Statistics* out, int threads, Isa isa);

}  // namespace gradprune
