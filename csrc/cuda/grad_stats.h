// Statistics of many gradients on a GPU, each read once, all of them in one launch.
#pragma once

#include <cstdint>

#include "cuda/chunk_table.h"

namespace gradprune {

// out: [gradients, 5] fp64: sum|g|, sum g^2, max|g|, min|g| over the finite elements, and the number of others.
// parts: [chunks, 5] fp64 scratch. first_chunks: [gradients + 1] int64, the row of the table at which each gradient
// begins, and their number. All addresses on the device.
//
// A thread adds up every 256th vector of a chunk in fp32 (fp64 for fp64); the block's 256 sums, and the chunks', are
// added in fp64, in an order that depends on nothing but the table. Asynchronous on `stream`.
// Throws std::runtime_error where a kernel cannot be launched.
void grad_stats_cuda(const ChunkTable& table, const std::int64_t* first_chunks, std::int64_t gradients, double* parts,
                     double* out, Stream stream);

}  // namespace gradprune
