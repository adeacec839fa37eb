// Scale many gradients in place, each by its own factor.
#pragma once

#include <vector>

#include "cpu/gradient_run.h"
#include "cpu/kernel_table.h"

namespace gradprune {

// g <- g * scale. The product is formed in fp32 with the scale in fp32 (fp64 for fp64 gradients), then rounded to
// nearest even: the same bits as g.mul_(scale) in PyTorch. A gradient whose scale is 1 is not touched. Runs of 65536
// elements are divided among threads.
void scale_gradients(const std::vector<Gradient>& gradients, const std::vector<double>& scales, int threads, Isa isa);

}  // namespace gradprune
