#include "cpu/grad_stats.h"

#include <array>
#include <limits>

#include "cpu/parallel.h"

namespace gradprune {
namespace {

using Statistics = std::array<double, kStatistics>;

constexpr Statistics kNothing = {0.0, 0.0, 0.0, std::numeric_limits<double>::infinity(), 0.0};

void merge(double* into, const Statistics& from) {
  into[kSumAbs] += from[kSumAbs];
  into[kSumSquare] += from[kSumSquare];
  into[kMaxAbs] = std::max(into[kMaxAbs], from[kMaxAbs]);
  into[kMinAbs] = std::min(into[kMinAbs], from[kMinAbs]);
  into[kNonFinite] += from[kNonFinite];
}

}  // namespace

void grad_stats(const std::vector<Gradient>& gradients, double* out, int threads, Isa isa) {
  const std::vector<GradientRun> runs = cut_into_runs(gradients);
  std::vector<Statistics> parts(runs.size(), kNothing);
  const KernelTable& table = kernels(isa);
  parallel_for(static_cast<std::ptrdiff_t>(runs.size()), threads, [&](std::ptrdiff_t i) {
    const GradientRun& run = runs[static_cast<std::size_t>(i)];
    const Gradient& gradient = gradients[run.index];
    table.grad_stats[static_cast<int>(gradient.type)](offset(gradient.data, gradient.type, run.first), run.count,
                                                      parts[static_cast<std::size_t>(i)].data());
  });
  for (std::size_t k = 0; k < gradients.size(); ++k) std::copy(kNothing.begin(), kNothing.end(), out + k * kStatistics);
  for (std::size_t i = 0; i < runs.size(); ++i) merge(out + runs[i].index * kStatistics, parts[i]);
}

}  // namespace gradprune
