// Many gradients on a GPU, each times its own scale, in place, all of them in one launch.
#pragma once

#include "cuda/chunk_table.h"

namespace gradprune {

// g <- g * scale. The product in fp32 with the scale in fp32 (fp64 for fp64), then rounded to nearest even: the same
// bits as g.mul_(scale) in PyTorch. A gradient whose scale is 1 is not touched.
// scales: [gradients] fp64, on the device. Asynchronous on `stream`.
// Throws std::runtime_error if the kernel cannot be launched.
void scale_gradients_cuda(const ChunkTable& table, const double* scales, Stream stream);

}  // namespace gradprune
