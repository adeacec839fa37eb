#include "cpu/mask_gradient.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace gradprune {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr std::ptrdiff_t kElementsPerThread = 1 << 15;

template <class T>
void mask_gradient_as(const Activations& x, const Activations& dx, std::ptrdiff_t samples, std::ptrdiff_t tokens,
                      std::ptrdiff_t columns, const MaskOutputs& outputs, int threads, const KernelTable& table) {
  const MaskStripKernel kernel = table.mask_strip.at(x.type);
  const std::ptrdiff_t strips = divide_up(columns, kMaskColumns);
  const std::ptrdiff_t work = samples * tokens * columns / kElementsPerThread;
  threads = static_cast<int>(std::clamp<std::ptrdiff_t>(work, 1, threads));
  parallel_for(samples * strips, threads, [&](std::ptrdiff_t i) {
    const std::ptrdiff_t sample = i / strips, first = i % strips * kMaskColumns;
    const std::ptrdiff_t width = std::min(kMaskColumns, columns - first);
    double gradient[kMaskColumns] = {}, square[kMaskColumns] = {};
    kernel({offset(x.data, x.type, sample * x.sample_stride + first), x.token_stride,
            offset(dx.data, dx.type, sample * dx.sample_stride + first), dx.token_stride, tokens, width, gradient, square});
    T* to_gradient = static_cast<T*>(outputs.gradient) + sample * columns + first;
    T* to_square = static_cast<T*>(outputs.square) + sample * columns + first;
    for (std::ptrdiff_t k = 0; k < width; ++k) {
      to_gradient[k] = static_cast<T>(gradient[k]);
      to_square[k] = static_cast<T>(square[k]);
    }
  });
}

}  // namespace

void mask_gradient(const Activations& x, const Activations& dx, std::ptrdiff_t samples, std::ptrdiff_t tokens,
                   std::ptrdiff_t columns, const MaskOutputs& outputs, int threads, Isa isa) {
  const auto run = x.type == ElementType::Float64 ? mask_gradient_as<double> : mask_gradient_as<float>;
  run(x, dx, samples, tokens, columns, outputs, threads, kernels(isa));
}

}  // namespace gradprune
