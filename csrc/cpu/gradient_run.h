// Cuts gradients into runs of equal length (the last of each gradient may be shorter), which are divided among threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "cpu/element_type.h"

namespace gradprune {

// One gradient: `count` consecutive elements.
struct Gradient {
  void* data;
  std::ptrdiff_t count;
  ElementType type;
};

// Elements [first, first + count) of gradient `index`.
struct GradientRun {
  std::size_t index;
  std::ptrdiff_t first, count;
};

// Long enough that a run's overhead vanishes, short enough that one large tensor keeps every thread busy.
constexpr std::ptrdiff_t kRunElements = 65536;

// Runs depend only on the sizes of the gradients, never on the number of threads.
inline std::vector<GradientRun> cut_into_runs(const std::vector<Gradient>& gradients) {
  std::vector<GradientRun> runs;
  for (std::size_t index = 0; index < gradients.size(); ++index)
    for (std::ptrdiff_t first = 0; first < gradients[index].count; first += kRunElements)
      runs.push_back({index, first, std::min(kRunElements, gradients[index].count - first)});
  return runs;
}

}  // namespace gradprune
