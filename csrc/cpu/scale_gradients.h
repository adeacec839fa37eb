// Many gradients, each times its own scale, in place.
#pragma once

#include <vector>

#include "cpu/gradient_run.h"
#include "cpu/kernel_table.h"

namespace gradprune {

// g <- g * scale. The product in fp32 with the scale in fp32 (fp64 for fp64), then rounded to nearest even: the same
// bits as g.mul_(scale) in PyTorch. A gradient whose scale is 1 is not touched.
void scale_gradients(const std::vector<Gradient>& gradients, const std::vector<double>& scales, int threads, Isa isa);

}  // namespace gradprune
