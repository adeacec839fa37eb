#include "cpu/scale_gradients.h"

#include "cpu/parallel.h"

namespace gradprune {

void scale_gradients(const std::vector<Gradient>& gradients, const std::vector<double>& scales, int threads, Isa isa) {
  const std::vector<GradientRun> runs = cut_into_runs(gradients);
  const KernelTable& table = kernels(isa);
  parallel_for(static_cast<std::ptrdiff_t>(runs.size()), threads, [&](std::ptrdiff_t i) {
    const GradientRun& run = runs[static_cast<std::size_t>(i)];
    const Gradient& gradient = gradients[run.index];
    if (scales[run.index] == 1.0) return;
    void* first = const_cast<char*>(offset(gradient.data, gradient.type, run.first));
    table.scale.at(gradient.type)(first, run.count, scales[run.index]);
  });
}

}  // namespace gradprune
