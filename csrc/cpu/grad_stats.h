// Statistics of many gradients, each read once.
#pragma once

#include <vector>

#include "cpu/gradient_run.h"
#include "cpu/kernel_table.h"

namespace gradprune {

// out: one entry per gradient. Sums of 4096 elements in fp32 (fp64 for fp64), over those in fp64. Deterministic for any
// number of threads.
void grad_stats(const std::vector<Gradient>& gradients, Statistics* out, int threads, Isa isa);

}  // namespace gradprune
