// Statistics of a gradient's elements, shared by the CPU kernels and the CUDA kernels.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define GRADPRUNE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GRADPRUNE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace gradprune {

// Non-finite elements are counted in non_finite and enter no other field. Python reads the struct as an array of
// double, so the order of the fields is that of gradprune.ops.vectors.GradientStatistics; a test compares both through
// _C.STATISTICS.
struct Statistics {
  double sum_abs, sum_square, max_abs, min_abs, non_finite;
};
constexpr int kStatistics = 5;
static_assert(sizeof(Statistics) == kStatistics * sizeof(double), "an array of double");

// Internal linkage: files compiled for different instruction sets include this and must not share a symbol.
namespace {

// The statistics of no elements at all.
GRADPRUNE_HOST_DEVICE Statistics no_statistics() { return {0.0, 0.0, 0.0, INFINITY, 0.0}; }

GRADPRUNE_HOST_DEVICE void merge(Statistics& into, const Statistics& from) {
  into.sum_abs += from.sum_abs;
  into.sum_square += from.sum_square;
  into.max_abs = from.max_abs > into.max_abs ? from.max_abs : into.max_abs;
  into.min_abs = from.min_abs < into.min_abs ? from.min_abs : into.min_abs;
  into.non_finite += from.non_finite;
}

}  // namespace
}  // namespace gradprune
