#include "cpu/grad_stats.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace gradprune {

void grad_stats(const std::vector<Gradient>& gradients, Statistics* out, int threads, Isa isa) {
  const std::vector<GradientRun> runs = cut_into_runs(gradients);
  std::vector<Statistics> of_runs(runs.size(), no_statistics());
  const KernelTable& table = kernels(isa);
  parallel_for(static_cast<std::ptrdiff_t>(runs.size()), threads, [&](std::ptrdiff_t i) {
    const GradientRun& run = runs[static_cast<std::size_t>(i)];
    const Gradient& gradient = gradients[run.index];
    table.grad_stats.at(gradient.type)(offset(gradient.data, gradient.type, run.first), run.count,
                                       of_runs[static_cast<std::size_t>(i)]);
  });
  std::fill_n(out, gradients.size(), no_statistics());
  for (std::size_t i = 0; i < runs.size(); ++i) merge(out[runs[i].index], of_runs[i]);
}

}  // namespace gradprune
