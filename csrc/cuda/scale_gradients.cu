#include "cuda/scale_gradients.h"

#include "cuda/launch.h"
#include "cuda/scaling.h"

namespace gradprune {
namespace {

// One block per chunk; a chunk whose scale is 1 is neither read nor written.
__global__ void __launch_bounds__(kBlockThreads) scale_chunk(const Chunk* chunks, const double* scales) {
  const Chunk chunk = chunks[blockIdx.x];
  const double scale = scales[chunk.index];
  if (scale != 1.0) scale_of_thread(chunk, scale, static_cast<int>(threadIdx.x));
}

}  // namespace

void scale_gradients_cuda(const ChunkTable& table, const double* scales, Stream stream) {
  if (table.count == 0) return;
  scale_chunk<<<static_cast<unsigned>(table.count), kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      table.chunks, scales);
  require_launched("scale_gradients: scale_chunk");
}

}  // namespace gradprune
