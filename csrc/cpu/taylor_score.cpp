#include "cpu/taylor_score.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "cpu/parallel.h"

namespace gradprune {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr std::ptrdiff_t kElementsPerThread = 32768;
// Row or column sums that one thread combines at a time in the second stage.
constexpr std::ptrdiff_t kSumsAtOnce = 512;
// Tiles begin at multiples of so many columns: whole steps of the widest vectors.
constexpr std::ptrdiff_t kColumnMultiple = 64;

std::ptrdiff_t divide_up(std::ptrdiff_t n, std::ptrdiff_t by) { return (n + by - 1) / by; }

// The columns in as few tiles as can be, all about as wide: a narrow rest would be read slowly.
std::ptrdiff_t tile_width(std::ptrdiff_t columns) {
  const std::ptrdiff_t tiles = std::max<std::ptrdiff_t>(1, divide_up(columns, kTileColumns));
  return std::max<std::ptrdiff_t>(1, divide_up(divide_up(columns, tiles), kColumnMultiple)) * kColumnMultiple;
}

// The grid of tiles over [rows, columns], and the partial sums of its tiles:
// row sums [column tiles, kScores, rows], column sums [row tiles, kScores, columns], statistics [tiles, kStatistics].
template <class T>
struct Partials {
  std::ptrdiff_t rows, columns, tile_columns, row_tiles, column_tiles;
  std::unique_ptr<T[]> row_sums, column_sums;
  std::unique_ptr<double[]> statistics;

  Partials(std::ptrdiff_t rows, std::ptrdiff_t columns)
      : rows(rows),
        columns(columns),
        tile_columns(tile_width(columns)),
        row_tiles(divide_up(rows, kTileRows)),
        column_tiles(divide_up(columns, tile_columns)),
        row_sums(new T[static_cast<std::size_t>(column_tiles * kScores * rows)]),
        column_sums(new T[static_cast<std::size_t>(row_tiles * kScores * columns)]),
        statistics(new double[static_cast<std::size_t>(tiles() * kStatistics)]) {}

  std::ptrdiff_t tiles() const { return row_tiles * column_tiles; }
  T* row_sum(std::ptrdiff_t column_tile, int score) const {
    return row_sums.get() + (column_tile * kScores + score) * rows;
  }
  T* column_sum(std::ptrdiff_t row_tile, int score) const {
    return column_sums.get() + (row_tile * kScores + score) * columns;
  }
};

void clear_statistics(double* statistics) {
  std::fill_n(statistics, kStatistics, 0.0);
  statistics[kMinAbs] = std::numeric_limits<double>::infinity();
}

template <class T>
void score_tile(const Matrix& w, const Matrix& g, const Partials<T>& partials, std::ptrdiff_t index,
                TaylorTileKernel kernel) {
  const std::ptrdiff_t row_tile = index / partials.column_tiles, column_tile = index % partials.column_tiles;
  const std::ptrdiff_t row = row_tile * kTileRows, column = column_tile * partials.tile_columns;
  TaylorTile tile;
  tile.w = offset(w.data, w.type, row * w.stride + column);
  tile.g = offset(g.data, g.type, row * g.stride + column);
  tile.w_stride = w.stride;
  tile.g_stride = g.stride;
  tile.rows = std::min(kTileRows, partials.rows - row);
  tile.columns = std::min(partials.tile_columns, partials.columns - column);
  for (int s = 0; s < kScores; ++s) {
    tile.row[s] = partials.row_sum(column_tile, s) + row;
    tile.column[s] = partials.column_sum(row_tile, s) + column;
  }
  tile.statistics = partials.statistics.get() + index * kStatistics;
  clear_statistics(tile.statistics);
  kernel(tile);
}

// out[i] = sum over k of parts[k * stride + i], in order, in double, for i in [0, count) and count <= kSumsAtOnce.
template <class T>
void sum_parts(const T* parts, std::ptrdiff_t number, std::ptrdiff_t stride, std::ptrdiff_t count, T* out) {
  double sums[kSumsAtOnce] = {};
  for (std::ptrdiff_t k = 0; k < number; ++k)
    for (std::ptrdiff_t i = 0; i < count; ++i) sums[i] += parts[k * stride + i];
  for (std::ptrdiff_t i = 0; i < count; ++i) out[i] = static_cast<T>(sums[i]);
}

// Partial sums [number, kScores, length] of rows or columns, to be combined into out[kScores]: [length].
template <class T>
struct Combination {
  const T* parts;
  std::ptrdiff_t number, length;
  void* const (&out)[kScores];

  std::ptrdiff_t runs() const { return divide_up(length, kSumsAtOnce); }

  void run(std::ptrdiff_t index) const {
    const std::ptrdiff_t score = index / runs(), first = index % runs() * kSumsAtOnce;
    sum_parts(parts + score * length + first, number, kScores * length, std::min(kSumsAtOnce, length - first),
              static_cast<T*>(out[score]) + first);
  }
};

template <class T>
void combine_statistics(const double* parts, std::ptrdiff_t number, void* out) {
  double total[kStatistics];
  clear_statistics(total);
  for (std::ptrdiff_t k = 0; k < number; ++k, parts += kStatistics) {
    total[kSumAbs] += parts[kSumAbs];
    total[kSumSquare] += parts[kSumSquare];
    total[kMaxAbs] = std::max(total[kMaxAbs], parts[kMaxAbs]);
    total[kMinAbs] = std::min(total[kMinAbs], parts[kMinAbs]);
    total[kNonFinite] += parts[kNonFinite];
  }
  for (int s = 0; s < kStatistics; ++s) static_cast<T*>(out)[s] = static_cast<T>(total[s]);
}

template <class T>
void score(const Matrix& w, const Matrix& g, std::ptrdiff_t rows, std::ptrdiff_t columns, const TaylorOutputs& outputs,
           int threads, TaylorTileKernel kernel) {
  const Partials<T> partials(rows, columns);
  const std::ptrdiff_t useful = std::max<std::ptrdiff_t>(1, rows * columns / kElementsPerThread);
  threads = static_cast<int>(std::min<std::ptrdiff_t>(threads, useful));
  parallel_for(partials.tiles(), threads, [&](std::ptrdiff_t i) { score_tile(w, g, partials, i, kernel); });
  const Combination<T> row{partials.row_sums.get(), partials.column_tiles, rows, outputs.row};
  const Combination<T> column{partials.column_sums.get(), partials.row_tiles, columns, outputs.column};
  const std::ptrdiff_t row_runs = row.runs() * kScores, column_runs = column.runs() * kScores;
  parallel_for(row_runs + column_runs, threads,
               [&](std::ptrdiff_t i) { i < row_runs ? row.run(i) : column.run(i - row_runs); });
  combine_statistics<T>(partials.statistics.get(), partials.tiles(), outputs.statistics);
}

}  // namespace

bool taylor_score_supports(ElementType w, ElementType g) {
  return (w == ElementType::Float64) == (g == ElementType::Float64);
}

void taylor_score(const Matrix& w, const Matrix& g, std::ptrdiff_t rows, std::ptrdiff_t columns,
                  const TaylorOutputs& outputs, int threads, Isa isa) {
  const TaylorTileKernel kernel = kernels(isa).taylor_tile[static_cast<int>(w.type)][static_cast<int>(g.type)];
  if (w.type == ElementType::Float64)
    score<double>(w, g, rows, columns, outputs, threads, kernel);
  else
    score<float>(w, g, rows, columns, outputs, threads, kernel);
}

}  // namespace gradprune
