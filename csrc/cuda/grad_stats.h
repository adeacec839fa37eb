// Statistics of many gradients on a GPU: one launch reads all of them once, a second merges what its blocks found.
#pragma once

#include <cstdint>

#include "cuda/chunk_table.h"
#include "gradient_statistics.h"

namespace gradprune {

// first_chunks: [gradients + 1] int64, the row of the table at which each gradient begins, and the number of rows.
// of_chunks: [chunks], scratch. out: [gradients]. All addresses are on the device.
//
// A thread adds every 256th vector of a chunk in fp32 (fp64 for fp64 gradients). The sums of the block's 256 threads,
// and then those of a gradient's chunks, are added in fp64. The order depends only on the table, and there are no
// atomics, so results are deterministic. Asynchronous on `stream`.
// Throws std::runtime_error if a kernel cannot be launched.
void grad_stats_cuda(const ChunkTable& table, const std::int64_t* first_chunks, std::int64_t gradients,
                     Statistics* of_chunks, Statistics* out, Stream stream);

}  // namespace gradprune
