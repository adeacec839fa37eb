#include "cpu/linear_importance.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/parallel.h"

namespace gradprune {
namespace {

// A tile of G is made of whole panels on every instruction set; with its panels of dY it fits in a core's second-level
// cache.
constexpr std::ptrdiff_t kGradientRows = 120;
constexpr std::ptrdiff_t kGradientColumns = 256;
// Below this many multiplications a second thread costs more than it saves.
constexpr std::ptrdiff_t kMultiplicationsPerThread = 1 << 18;
// A cache line: no vector then straddles two.
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
  Panels(std::ptrdiff_t width, std::ptrdiff_t tokens, std::ptrdiff_t panel_width)
      : width_(width),
        tokens_(tokens),
        panel_width_(panel_width),
        data_(aligned_array<T>(padded(width) * tokens)) {}

  std::ptrdiff_t panels() const { return divide_up(width_, panel_width_); }
  // The next multiple of a panel's width.
  std::ptrdiff_t padded(std::ptrdiff_t width) const { return divide_up(width, panel_width_) * panel_width_; }
  // The panels from `column` on, the first column of a panel.
  const T* at(std::ptrdiff_t column) const { return data_.get() + column * tokens_; }

  void pack(const Activations& from, std::ptrdiff_t sample, std::ptrdiff_t panel, PackKernel kernel) {
    const std::ptrdiff_t first = panel * panel_width_, valid = std::min(panel_width_, width_ - first);
    const void* source = offset(from.data, from.type, sample * from.sample_stride + first);
    kernel(source, from.token_stride, tokens_, valid, data_.get() + first * tokens_);
  }

 private:
  std::ptrdiff_t width_, tokens_, panel_width_;
  std::unique_ptr<T[], Free> data_;
};

// The type that the gradient is computed in.
template <class T>
constexpr ElementType kGradientType = sizeof(T) == sizeof(double) ? ElementType::Float64 : ElementType::Float32;

// Computes a tile of G and scores it.
template <class T>
void score_tile(const Panels<T>& dy, const Panels<T>& x, std::ptrdiff_t tokens, const Matrix& w,
                const TileSums<T>& sums, std::ptrdiff_t index, GradientTileKernel multiply, TaylorTileKernel score) {
  alignas(kAlignment) T g[kGradientRows * kGradientColumns];
  const std::ptrdiff_t row = sums.row(index), column = sums.column(index);
  const TaylorTile tile = sums.tile(index, w.from(row, column), {g, kGradientColumns, kGradientType<T>});
  multiply({dy.at(row), x.at(column), g, kGradientColumns, dy.padded(tile.rows), x.padded(tile.columns), tokens});
  score(tile);
}

template <class T>
void score_samples(const Activations& x, const Activations& dy, const Matrix& w, const LinearShape& shape,
                   const TaylorOutputs& outputs, int threads, const KernelTable& table) {
  const TaylorTileKernel score = table.taylor_tile.at(outputs.side).at(w.type).at(kGradientType<T>);
  const GradientTileKernel multiply = table.gradient_tile.at(kGradientType<T>);
  const PackKernel pack_x = table.pack_x.at(x.type), pack_dy = table.pack_dy.at(dy.type);
  const std::ptrdiff_t work = shape.rows * shape.columns * std::max<std::ptrdiff_t>(1, shape.tokens);
  threads = static_cast<int>(std::clamp<std::ptrdiff_t>(work / kMultiplicationsPerThread, 1, threads));

  Panels<T> x_panels(shape.columns, shape.tokens, table.x_panel_bytes / static_cast<int>(sizeof(T)));
  Panels<T> dy_panels(shape.rows, shape.tokens, table.dy_panel_columns);
  const TileSums<T> sums(outputs.side, shape.rows, shape.columns, kGradientRows, kGradientColumns);
  Totals totals(outputs.side, shape.rows, shape.columns);
  for (std::ptrdiff_t n = 0; n < shape.samples; ++n) {
    parallel_for(x_panels.panels() + dy_panels.panels(), threads, [&](std::ptrdiff_t i) {
      if (i < x_panels.panels())
        x_panels.pack(x, n, i, pack_x);
      else
        dy_panels.pack(dy, n, i - x_panels.panels(), pack_dy);
    });
    parallel_for(sums.tiles(), threads, [&](std::ptrdiff_t i) {
      score_tile(dy_panels, x_panels, shape.tokens, w, sums, i, multiply, score);
    });
    totals.add(sums, threads);
  }
  totals.store<T>(outputs);
}

}  // namespace

void linear_importance(const Activations& x, const Activations& dy, const Matrix& w, const LinearShape& shape,
                       const TaylorOutputs& outputs, int threads, Isa isa) {
  if (w.type == ElementType::Float64)
    score_samples<double>(x, dy, w, shape, outputs, threads, kernels(isa));
  else
    score_samples<float>(x, dy, w, shape, outputs, threads, kernels(isa));
}

}  // namespace gradprune
