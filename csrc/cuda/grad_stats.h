// Statistics of many gradients on a GPU, each read once, all of them in one launch.
#pragma once

#include <cstdint>

#include "cuda/chunk_table.h"
#include "gradient_statistics.h"

namespace gradprune {

// out: [gradients]. of_chunks: [chunks], scratch. first_chunks: [gradients + 1] int64, the row of the table at which each
// gradient begins, and the number of rows. All addresses on the device.
//
// A thread adds up every 256th vector of a chunk in fp32 (fp64 for fp64); the block's 256 sums, then the chunks', are
// added in fp64, in an order that depends on the table alone. Asynchronous on `stream`.
// Throws std::runtime_error if a kernel cannot be launched.
void grad_stats_cuda(const ChunkTable& table, const std::int64_t* first_chunks, std::int64_t gradients,
                     Statistics* of_chunks, Statistics* out, Stream stream);

}  // namespace gradprune
