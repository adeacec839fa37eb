#include "cpu/linear_importance.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/parallel.h"

namespace gradprune {
namespace {

// A tile of G consists of whole panels on every instruction set. Together with its panels of dY it fits in a core's
// second-level cache.
constexpr std::ptrdiff_t kGradientRows = 120;
constexpr std::ptrdiff_t kGradientColumns = 256;
// Below this many multiplications a second thread costs more than it saves.
constexpr std::ptrdiff_t kMultiplicationsPerThread = 1 << 18;
// A cache line, so that no vector straddles two of them.
constexpr std::size_t kAlignment = 64;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <class T>
std::unique_ptr<T[], Free> aligned_array(std::ptrdiff_t count) {
  const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) / kAlignment + 1) * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>(static_cast<T*>(memory));
}

// One sample's X or dY in panels [width / panel width, tokens, panel width].
template <class T>
class Panels {
 public:
  // Allocates room for one sample of at most `most` tokens.
  Panels(std::ptrdiff_t width, std::ptrdiff_t most, std::ptrdiff_t panel_width)
      : width_(width), panel_width_(panel_width), data_(aligned_array<T>(padded(width) * most)) {}

  // Starts a sample of `tokens` tokens.
  void begin(std::ptrdiff_t tokens) { tokens_ = tokens; }

  std::ptrdiff_t panels() const { return divide_up(width_, panel_width_); }
  // The next multiple of a panel's width.
  std::ptrdiff_t padded(std::ptrdiff_t width) const { return divide_up(width, panel_width_) * panel_width_; }
  // The panel that starts at `column`; those after it follow in memory.
  const T* at(std::ptrdiff_t column) const { return data_.get() + column * tokens_; }

  // Packs panel number `panel`. start: the offset of the sample's first element.
  void pack(const Activations& from, std::ptrdiff_t start, std::ptrdiff_t panel, PackKernel kernel) {
    const std::ptrdiff_t first = panel * panel_width_, valid = std::min(panel_width_, width_ - first);
    const void* source = offset(from.data, from.type, start + first);
    kernel(source, from.token_stride, tokens_, valid, data_.get() + first * tokens_);
  }

 private:
  std::ptrdiff_t width_, panel_width_, tokens_ = 0;
  std::unique_ptr<T[], Free> data_;
};

// The type that the gradient is computed in, fp32 or fp64.
template <class T>
constexpr ElementType kGradientType = sizeof(T) == sizeof(double) ? ElementType::Float64 : ElementType::Float32;

// Computes a tile of G on the stack and scores it while it is in the core's own cache.
template <class T>
void score_tile(const Panels<T>& dy, const Panels<T>& x, std::ptrdiff_t tokens, const Matrix& w,
                const TileSums<T>& sums, std::ptrdiff_t index, GradientTileKernel multiply, TaylorTileKernel score) {
  alignas(kAlignment) T g[kGradientRows * kGradientColumns];
  const std::ptrdiff_t row = sums.row(index), column = sums.column(index);
  const TaylorTile tile = sums.tile(index, w.from(row, column), {g, kGradientColumns, kGradientType<T>});
  multiply({dy.at(row), x.at(column), g, kGradientColumns, dy.padded(tile.rows), x.padded(tile.columns), tokens});
  score(tile);
}

// The addresses of one expert's outputs.
template <class T>
TaylorOutputs of_expert(const TaylorOutputs& of_all, std::ptrdiff_t expert, const GroupedShape& shape) {
  TaylorOutputs own = of_all;
  for (int s = 0; s < kScores; ++s) {
    if (has_rows(own.side)) own.row[s] = static_cast<T*>(own.row[s]) + expert * kScores * shape.rows;
    if (has_columns(own.side)) own.column[s] = static_cast<T*>(own.column[s]) + expert * kScores * shape.columns;
  }
  own.statistics = static_cast<T*>(own.statistics) + expert * kStatistics;
  return own;
}

// One sample's tokens: the offsets of their first elements in X and in dY, and their number.
struct Segment {
  std::ptrdiff_t x, dy, tokens;
};

// Scores the gradients of samples for weights [rows, columns], one sample after the other. Threads share a sample: they
// first pack its panels, then compute and score its tiles.
template <class T>
class Scorer {
 public:
  // most: the number of tokens of the longest sample. tokens: the mean number, from which the number of threads
  // follows.
  Scorer(const Activations& x, const Activations& dy, ElementType w, std::ptrdiff_t rows, std::ptrdiff_t columns,
         std::ptrdiff_t most, std::ptrdiff_t tokens, Side side, int threads, const KernelTable& table)
      : x_(x),
        dy_(dy),
        score_(table.taylor_tile.at(side).at(w).at(kGradientType<T>)),
        multiply_(table.gradient_tile.at(kGradientType<T>)),
        pack_x_(table.pack_x.at(x.type)),
        pack_dy_(table.pack_dy.at(dy.type)),
        x_panels_(columns, most, table.x_panel_bytes / static_cast<int>(sizeof(T))),
        dy_panels_(rows, most, table.dy_panel_columns),
        sums_(side, rows, columns, kGradientRows, kGradientColumns) {
    const std::ptrdiff_t work = rows * columns * std::max<std::ptrdiff_t>(1, tokens);
    threads_ = static_cast<int>(std::clamp<std::ptrdiff_t>(work / kMultiplicationsPerThread, 1, threads));
  }

  void add(const Segment& sample, const Matrix& w, Totals& totals) {
    x_panels_.begin(sample.tokens);
    dy_panels_.begin(sample.tokens);
    parallel_for(x_panels_.panels() + dy_panels_.panels(), threads_, [&](std::ptrdiff_t i) {
      if (i < x_panels_.panels())
        x_panels_.pack(x_, sample.x, i, pack_x_);
      else
        dy_panels_.pack(dy_, sample.dy, i - x_panels_.panels(), pack_dy_);
    });
    parallel_for(sums_.tiles(), threads_, [&](std::ptrdiff_t i) {
      score_tile(dy_panels_, x_panels_, sample.tokens, w, sums_, i, multiply_, score_);
    });
    totals.add(sums_, threads_);
  }

 private:
  const Activations &x_, &dy_;
  TaylorTileKernel score_;
  GradientTileKernel multiply_;
  PackKernel pack_x_, pack_dy_;
  Panels<T> x_panels_, dy_panels_;
  TileSums<T> sums_;
  int threads_;
};

template <class T>
void score_samples(const Activations& x, const Activations& dy, const Matrix& w, const LinearShape& shape,
                   const TaylorOutputs& outputs, int threads, const KernelTable& table) {
  Scorer<T> scorer(x, dy, w.type, shape.rows, shape.columns, shape.tokens, shape.tokens, outputs.side, threads, table);
  Totals totals(outputs.side, shape.rows, shape.columns);
  for (std::ptrdiff_t n = 0; n < shape.samples; ++n)
    scorer.add({n * x.sample_stride, n * dy.sample_stride, shape.tokens}, w, totals);
  totals.store<T>(outputs);
}

template <class T>
void score_experts(const Activations& x, const Activations& dy, const Matrix& w, std::ptrdiff_t w_expert_stride,
                   const std::int64_t* offsets, const GroupedShape& shape, const TaylorOutputs& outputs, int threads,
                   const KernelTable& table) {
  const std::ptrdiff_t segments = shape.experts * shape.samples;
  std::ptrdiff_t most = 0;
  for (std::ptrdiff_t k = 0; k < segments; ++k) most = std::max<std::ptrdiff_t>(most, offsets[k + 1] - offsets[k]);
  const std::ptrdiff_t tokens = (offsets[segments] - offsets[0]) / std::max<std::ptrdiff_t>(1, segments);
  Scorer<T> scorer(x, dy, w.type, shape.rows, shape.columns, most, tokens, outputs.side, threads, table);
  for (std::ptrdiff_t e = 0; e < shape.experts; ++e) {
    const Matrix own{offset(w.data, w.type, e * w_expert_stride), w.stride, w.type};
    Totals totals(outputs.side, shape.rows, shape.columns);
    for (std::ptrdiff_t k = e * shape.samples; k < (e + 1) * shape.samples; ++k)
      scorer.add({offsets[k] * x.token_stride, offsets[k] * dy.token_stride, offsets[k + 1] - offsets[k]}, own, totals);
    totals.store<T>(of_expert<T>(outputs, e, shape));
  }
}

}  // namespace

void linear_importance(const Activations& x, const Activations& dy, const Matrix& w, const LinearShape& shape,
                       const TaylorOutputs& outputs, int threads, Isa isa) {
  if (w.type == ElementType::Float64)
    score_samples<double>(x, dy, w, shape, outputs, threads, kernels(isa));
  else
    score_samples<float>(x, dy, w, shape, outputs, threads, kernels(isa));
}

void grouped_linear_importance(const Activations& x, const Activations& dy, const Matrix& w,
                               std::ptrdiff_t w_expert_stride, const std::int64_t* offsets, const GroupedShape& shape,
                               const TaylorOutputs& outputs, int threads, Isa isa) {
  if (w.type == ElementType::Float64)
    score_experts<double>(x, dy, w, w_expert_stride, offsets, shape, outputs, threads, kernels(isa));
  else
    score_experts<float>(x, dy, w, w_expert_stride, offsets, shape, outputs, threads, kernels(isa));
}

}  // namespace gradprune
