#include "cuda/gradients.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cpu/element_type.h"
#include "cpu/kernel_table.h"

namespace gradprune {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

template <class E> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }

__device__ void narrow(float x, float* to) { *to = x; }
__device__ void narrow(double x, double* to) { *to = x; }
__device__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half* to) { *to = __float2half_rn(x); }

// 16 bytes of elements, read or written at once.
template <class E>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(E);
  E element[kSize];
};

// Calls body(element address) for this thread's elements of a run: whole packs where the run is aligned, then the rest.
template <class E, class Body, class PackBody>
__device__ void for_each(E* first, std::int64_t count, const Body& body, const PackBody& pack_body) {
  std::int64_t done = 0;
  if (reinterpret_cast<std::uintptr_t>(first) % sizeof(Pack<E>) == 0) {
    const std::int64_t packs = count / Pack<E>::kSize;
    auto* pack = reinterpret_cast<Pack<E>*>(first);
    for (std::int64_t i = threadIdx.x; i < packs; i += kThreads) pack_body(pack + i);
    done = packs * Pack<E>::kSize;
  }
  for (std::int64_t i = done + threadIdx.x; i < count; i += kThreads) body(first + i);
}

struct Statistics {
  double sum_abs = 0.0, sum_square = 0.0, max_abs = 0.0, min_abs = INFINITY, non_finite = 0.0;

  __device__ void merge(const Statistics& other) {
    sum_abs += other.sum_abs;
    sum_square += other.sum_square;
    max_abs = fmax(max_abs, other.max_abs);
    min_abs = fmin(min_abs, other.min_abs);
    non_finite += other.non_finite;
  }

  __device__ void store(double* to) const {
    to[kSumAbs] = sum_abs;
    to[kSumSquare] = sum_square;
    to[kMaxAbs] = max_abs;
    to[kMinAbs] = min_abs;
    to[kNonFinite] = non_finite;
  }
};

// What one thread sees: at most kRunElements / kThreads elements are added up in T before they go into a double.
template <class T>
struct ThreadStatistics {
  T sum_abs = 0, sum_square = 0, max_abs = 0, min_abs = INFINITY;
  int non_finite = 0;

  __device__ void add(T g) {
    const T magnitude = fabs(g);
    if (isfinite(magnitude)) {
      sum_abs += magnitude;
      sum_square += magnitude * magnitude;
      max_abs = fmax(max_abs, magnitude);
      min_abs = fmin(min_abs, magnitude);
    } else {
      ++non_finite;
    }
  }

  __device__ Statistics wide() const {
    Statistics s;
    s.sum_abs = sum_abs;
    s.sum_square = sum_square;
    s.max_abs = max_abs;
    s.min_abs = min_abs;
    s.non_finite = non_finite;
    return s;
  }
};

// Combined over the lanes of a warp, in a fixed order; lane 0 has the result.
__device__ Statistics warp_merged(Statistics s) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    Statistics other;
    other.sum_abs = __shfl_down_sync(kAll, s.sum_abs, offset);
    other.sum_square = __shfl_down_sync(kAll, s.sum_square, offset);
    other.max_abs = __shfl_down_sync(kAll, s.max_abs, offset);
    other.min_abs = __shfl_down_sync(kAll, s.min_abs, offset);
    other.non_finite = __shfl_down_sync(kAll, s.non_finite, offset);
    s.merge(other);
  }
  return s;
}

template <class E>
__device__ Statistics statistics_of(const CudaRun& run) {
  using T = typename Compute<E>::type;
  ThreadStatistics<T> own;
  for_each(
      reinterpret_cast<E*>(run.address), run.count, [&](const E* g) { own.add(widen(*g)); },
      [&](const Pack<E>* pack) {
        const Pack<E> g = *pack;
        for (int k = 0; k < Pack<E>::kSize; ++k) own.add(widen(g.element[k]));
      });
  return own.wide();
}

__global__ void __launch_bounds__(kThreads) grad_stats_kernel(const CudaRun* runs, double* parts) {
  const CudaRun run = runs[blockIdx.x];
  Statistics s;
  switch (static_cast<ElementType>(run.type)) {
    case ElementType::Float32: s = statistics_of<float>(run); break;
    case ElementType::BFloat16: s = statistics_of<__nv_bfloat16>(run); break;
    case ElementType::Float16: s = statistics_of<__half>(run); break;
    case ElementType::Float64: s = statistics_of<double>(run); break;
  }
  __shared__ Statistics of_warp[kThreads / kWarp];
  s = warp_merged(s);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = s;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) s.merge(of_warp[warp]);
  s.store(parts + blockIdx.x * static_cast<std::int64_t>(kStatistics));
}

// One warp a gradient: its runs' parts, in a fixed order.
__global__ void combine_kernel(const std::int64_t* first_run, const double* parts, double* out) {
  Statistics s;
  for (std::int64_t run = first_run[blockIdx.x] + threadIdx.x; run < first_run[blockIdx.x + 1]; run += kWarp) {
    const double* part = parts + run * kStatistics;
    Statistics other;
    other.sum_abs = part[kSumAbs];
    other.sum_square = part[kSumSquare];
    other.max_abs = part[kMaxAbs];
    other.min_abs = part[kMinAbs];
    other.non_finite = part[kNonFinite];
    s.merge(other);
  }
  s = warp_merged(s);
  if (threadIdx.x == 0) s.store(out + blockIdx.x * static_cast<std::int64_t>(kStatistics));
}

template <class E>
__device__ void scale_run(const CudaRun& run, double factor) {
  using T = typename Compute<E>::type;
  const T scale = static_cast<T>(factor);
  for_each(
      reinterpret_cast<E*>(run.address), run.count, [&](E* g) { narrow(widen(*g) * scale, g); },
      [&](Pack<E>* pack) {
        Pack<E> g = *pack;
        for (int k = 0; k < Pack<E>::kSize; ++k) narrow(widen(g.element[k]) * scale, &g.element[k]);
        *pack = g;
      });
}

__global__ void __launch_bounds__(kThreads) scale_gradients_kernel(const CudaRun* runs, const double* scales) {
  const CudaRun run = runs[blockIdx.x];
  const double scale = scales[run.gradient];
  if (scale == 1.0) return;
  switch (static_cast<ElementType>(run.type)) {
    case ElementType::Float32: scale_run<float>(run, scale); break;
    case ElementType::BFloat16: scale_run<__nv_bfloat16>(run, scale); break;
    case ElementType::Float16: scale_run<__half>(run, scale); break;
    case ElementType::Float64: scale_run<double>(run, scale); break;
  }
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* grad_stats_cuda(const CudaRun* runs, std::int64_t count, const std::int64_t* first_run,
                            std::int64_t gradients, double* parts, double* out, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (count > 0) grad_stats_kernel<<<static_cast<unsigned>(count), kThreads, 0, queue>>>(runs, parts);
  if (gradients > 0) combine_kernel<<<static_cast<unsigned>(gradients), kWarp, 0, queue>>>(first_run, parts, out);
  return launch_error();
}

const char* scale_gradients_cuda(const CudaRun* runs, std::int64_t count, const double* scales, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (count > 0) scale_gradients_kernel<<<static_cast<unsigned>(count), kThreads, 0, queue>>>(runs, scales);
  return launch_error();
}

}  // namespace gradprune
