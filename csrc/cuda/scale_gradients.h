// Scale many gradients on a GPU in place, each by its own factor, in one launch that reads and writes every element
// once.
#pragma once

#include "cuda/chunk_table.h"

namespace gradprune {

// g <- g * scale. The product is formed in fp32 with the scale in fp32 (fp64 for fp64 gradients), then rounded to
// nearest even: the same bits as g.mul_(scale) in PyTorch. A gradient whose scale is 1 is not touched.
// scales: [gradients] fp64, on the device. Asynchronous on `stream`.
// Throws std::runtime_error if the kernel cannot be launched.
void scale_gradients_cuda(const ChunkTable& table, const double* scales, Stream stream);

}  // namespace gradprune
