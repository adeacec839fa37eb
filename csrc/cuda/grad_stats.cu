#include "cuda/grad_stats.h"

#include "cuda/launch.h"
#include "cuda/statistics.h"

namespace gradprune {
namespace {

// Writes to `out` what the threads of the block have, merged. Called by all of them.
__device__ void merge_block(const Statistics& mine, Statistics* out) {
  __shared__ Statistics parts[kBlockThreads];
  const int thread = static_cast<int>(threadIdx.x);
  parts[thread] = mine;
  for (int half = kBlockThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    merge_step(parts, half, thread);
  }
  if (thread == 0) *out = parts[0];
}

// A block a chunk.
__global__ void __launch_bounds__(kBlockThreads) chunk_statistics(const Chunk* chunks, Statistics* parts) {
  merge_block(statistics_of_thread(chunks[blockIdx.x], static_cast<int>(threadIdx.x)), parts + blockIdx.x);
}

// A block a gradient.
__global__ void __launch_bounds__(kBlockThreads)
    gradient_statistics(const Statistics* parts, const std::int64_t* first_chunks, Statistics* out) {
  const std::int64_t first = first_chunks[blockIdx.x], last = first_chunks[blockIdx.x + 1];
  merge_block(merge_of_thread(parts, first, last, static_cast<int>(threadIdx.x)), out + blockIdx.x);
}

}  // namespace

void grad_stats_cuda(const ChunkTable& table, const std::int64_t* first_chunks, std::int64_t gradients, double* parts,
                     double* out, Stream stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  auto* chunk_parts = reinterpret_cast<Statistics*>(parts);
  if (table.count > 0) {
    chunk_statistics<<<static_cast<unsigned>(table.count), kBlockThreads, 0, on>>>(table.chunks, chunk_parts);
    require_launched("grad_stats: chunk_statistics");
  }
  if (gradients > 0) {
    gradient_statistics<<<static_cast<unsigned>(gradients), kBlockThreads, 0, on>>>(
        chunk_parts, first_chunks, reinterpret_cast<Statistics*>(out));
    require_launched("grad_stats: gradient_statistics");
  }
}

// Asks for a kernel of this file: finds a missing or too old driver, no device, and a device not compiled for.
const char* cuda_fault() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, chunk_statistics);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // so that the next launch does not report it
  return cudaGetErrorString(error);
}

}  // namespace gradprune
