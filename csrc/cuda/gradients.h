// grad_stats and scale_gradients of many gradients in one launch each, for CUDA. Everything is asynchronous on `stream`
// (a cudaStream_t); all memory belongs to the caller.
#pragma once

#include <cstdint>

namespace gradprune {

// A run of consecutive elements of one gradient. A table of these lies in device memory. Runs are cut by the caller at
// lengths that depend on the sizes alone, so that results have the same bits on every device.
struct CudaRun {
  std::int64_t address;  // of the first element
  std::int64_t count;
  std::int64_t type;      // ElementType
  std::int64_t gradient;  // index of the gradient it belongs to
};

// out: [gradients, 5] fp64, as the C++ op of this name. first_run: [gradients + 1] int64, the runs of gradient k are
// first_run[k] ... first_run[k + 1] - 1. parts: [runs, 5] fp64 scratch. Returns an error message, or null.
const char* grad_stats_cuda(const CudaRun* runs, std::int64_t count, const std::int64_t* first_run,
                            std::int64_t gradients, double* parts, double* out, void* stream);

// g <- g * scale of its gradient; scales: [gradients] fp64. Returns an error message, or null.
const char* scale_gradients_cuda(const CudaRun* runs, std::int64_t count, const double* scales, void* stream);

}  // namespace gradprune
