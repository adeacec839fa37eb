#include "cpu/taylor_score.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace gradprune {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr std::ptrdiff_t kElementsPerThread = 32768;
// Tiles begin at multiples of this many columns, so that a tile consists of whole steps of the widest vectors.
constexpr std::ptrdiff_t kColumnMultiple = 64;

// The width of as few tiles as possible, all about equally wide, because a narrow last one would be read slowly.
std::ptrdiff_t tile_width(std::ptrdiff_t columns) {
  const std::ptrdiff_t tiles = std::max<std::ptrdiff_t>(1, divide_up(columns, kTileColumns));
  return std::max<std::ptrdiff_t>(1, divide_up(divide_up(columns, tiles), kColumnMultiple)) * kColumnMultiple;
}

template <class T>
void score(const Matrix& w, const Matrix& g, std::ptrdiff_t rows, std::ptrdiff_t columns, const TaylorOutputs& outputs,
           int threads, TaylorTileKernel kernel) {
  const TileSums<T> sums(outputs.side, rows, columns, kTileRows, tile_width(columns));
  const std::ptrdiff_t useful = std::max<std::ptrdiff_t>(1, rows * columns / kElementsPerThread);
  threads = static_cast<int>(std::min<std::ptrdiff_t>(threads, useful));
  parallel_for(sums.tiles(), threads, [&](std::ptrdiff_t i) {
    kernel(sums.tile(i, w.from(sums.row(i), sums.column(i)), g.from(sums.row(i), sums.column(i))));
  });
  Totals totals(outputs.side, rows, columns);
  totals.add(sums, threads);
  totals.store<T>(outputs);
}

}  // namespace

bool taylor_score_supports(ElementType w, ElementType g) {
  return (w == ElementType::Float64) == (g == ElementType::Float64);
}

void taylor_score(const Matrix& w, const Matrix& g, std::ptrdiff_t rows, std::ptrdiff_t columns,
                  const TaylorOutputs& outputs, int threads, Isa isa) {
  const TaylorTileKernel kernel = kernels(isa).taylor_tile.at(outputs.side).at(w.type).at(g.type);
  if (w.type == ElementType::Float64)
    score<double>(w, g, rows, columns, outputs, threads, kernel);
  else
    score<float>(w, g, rows, columns, outputs, threads, kernel);
}

}  // namespace gradprune
