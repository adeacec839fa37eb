#include "cuda/grad_stats.h"

#include "cuda/launch.h"
#include "cuda/statistics.h"

namespace gradprune {
namespace {

// Merges the statistics of the block's threads, in a tree of fixed order in shared memory, and writes them to `out`.
// All threads of the block must call it.
__device__ void merge_block(const Statistics& mine, Statistics* out) {
  __shared__ Statistics of_threads[kBlockThreads];
  const int thread = static_cast<int>(threadIdx.x);
  of_threads[thread] = mine;
  for (int half = kBlockThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    merge_step(of_threads, half, thread);
  }
  if (thread == 0) *out = of_threads[0];
}

// First stage: one block per chunk, whose elements are read once.
__global__ void __launch_bounds__(kBlockThreads) chunk_statistics(const Chunk* chunks, Statistics* of_chunks) {
  merge_block(statistics_of_thread(chunks[blockIdx.x], static_cast<int>(threadIdx.x)), of_chunks + blockIdx.x);
}

// Second stage: one block per gradient merges the statistics of its chunks.
__global__ void __launch_bounds__(kBlockThreads)
    gradient_statistics(const Statistics* of_chunks, const std::int64_t* first_chunks, Statistics* out) {
  const std::int64_t first = first_chunks[blockIdx.x], last = first_chunks[blockIdx.x + 1];
  merge_block(merge_of_thread(of_chunks, first, last, static_cast<int>(threadIdx.x)), out + blockIdx.x);
}

}  // namespace

void grad_stats_cuda(const ChunkTable& table, const std::int64_t* first_chunks, std::int64_t gradients,
                     Statistics* of_chunks, Statistics* out, Stream stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  if (table.count > 0) {
    chunk_statistics<<<static_cast<unsigned>(table.count), kBlockThreads, 0, on>>>(table.chunks, of_chunks);
    require_launched("grad_stats: chunk_statistics");
  }
  if (gradients > 0) {
    gradient_statistics<<<static_cast<unsigned>(gradients), kBlockThreads, 0, on>>>(of_chunks, first_chunks, out);
    require_launched("grad_stats: gradient_statistics");
  }
}

// Asks for the attributes of a kernel of this file. That fails if the driver is missing or too old, if there is no
// device, or if the kernel is not compiled for it.
const char* cuda_fault() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, chunk_statistics);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // so that the next launch does not report it
  return cudaGetErrorString(error);
}

}  // namespace gradprune
