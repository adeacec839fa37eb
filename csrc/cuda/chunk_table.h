// The arguments that all launches have in common. Includes no CUDA header, so that the bindings compile without one.
#pragma once

#include <cstdint>

namespace gradprune {

struct Chunk;  // cuda/chunk.h

// [count, 4] int64 on the device: address, number of elements, element type, index of the gradient. The chunks of a
// gradient are consecutive rows, in the order of its elements.
struct ChunkTable {
  const Chunk* chunks;
  std::int64_t count;
};

using Stream = void*;  // a cudaStream_t

// The reason why the kernels cannot run on the current device, or null if they can.
const char* cuda_fault();

}  // namespace gradprune
