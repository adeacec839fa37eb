// Statistics of many gradients, each read once.
#pragma once

#include <vector>

#include "cpu/gradient_run.h"
#include "cpu/kernel_table.h"

namespace gradprune {

// out: [gradients, kStatistics]: sum|g|, sum g^2, max|g|, min|g| over the finite elements, and the number of others.
// Sums of 4096 elements in fp32 (fp64 for fp64), over those in fp64. Deterministic for any number of threads.
void grad_stats(const std::vector<Gradient>& gradients, double* out, int threads, Isa isa);

}  // namespace gradprune
