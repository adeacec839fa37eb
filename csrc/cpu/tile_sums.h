// Row and column sums and statistics of a matrix, tile by tile: what each tile leaves behind, and their total.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace gradprune {

inline std::ptrdiff_t divide_up(std::ptrdiff_t n, std::ptrdiff_t by) { return (n + by - 1) / by; }

inline void clear_statistics(double* statistics) {
  std::fill_n(statistics, kStatistics, 0.0);
  statistics[kMinAbs] = std::numeric_limits<double>::infinity();
}

// row[s]: [rows], column[s]: [columns], statistics: [kStatistics]; float, or double where W and G are double.
struct TaylorOutputs {
  void* row[kScores];
  void* column[kScores];
  void* statistics;
};

// The grid of tiles over [rows, columns], and the sums of its tiles:
// row sums [column tiles, kScores, rows], column sums [row tiles, kScores, columns], statistics [tiles, kStatistics].
// In scratch memory: a thread has one at a time.
template <class T>
struct TileSums {
  std::ptrdiff_t rows, columns, tile_rows, tile_columns, row_tiles, column_tiles;
  double* statistics;
  T *row_sums, *column_sums;

  TileSums(std::ptrdiff_t rows, std::ptrdiff_t columns, std::ptrdiff_t tile_rows, std::ptrdiff_t tile_columns)
      : rows(rows),
        columns(columns),
        tile_rows(tile_rows),
        tile_columns(tile_columns),
        row_tiles(divide_up(rows, tile_rows)),
        column_tiles(divide_up(columns, tile_columns)) {
    const std::ptrdiff_t of_rows = column_tiles * kScores * rows, of_columns = row_tiles * kScores * columns;
    const std::size_t bytes = sizeof(double) * tiles() * kStatistics + sizeof(T) * (of_rows + of_columns);
    statistics = reinterpret_cast<double*>(scratch<TileSums>(bytes));
    row_sums = reinterpret_cast<T*>(statistics + tiles() * kStatistics);
    column_sums = row_sums + of_rows;
  }

  TileSums(const TileSums&) = delete;

  std::ptrdiff_t tiles() const { return row_tiles * column_tiles; }

  // The first row and column of a tile.
  std::ptrdiff_t row(std::ptrdiff_t index) const { return index / column_tiles * tile_rows; }
  std::ptrdiff_t column(std::ptrdiff_t index) const { return index % column_tiles * tile_columns; }

  // A tile's size and where its sums go; its statistics are cleared.
  TaylorTile tile(std::ptrdiff_t index) const {
    TaylorTile tile{};
    tile.rows = std::min(tile_rows, rows - row(index));
    tile.columns = std::min(tile_columns, columns - column(index));
    for (int s = 0; s < kScores; ++s) {
      tile.row[s] = row_sums + (index % column_tiles * kScores + s) * rows + row(index);
      tile.column[s] = column_sums + (index / column_tiles * kScores + s) * columns + column(index);
    }
    tile.statistics = statistics + index * kStatistics;
    clear_statistics(tile.statistics);
    return tile;
  }
};

// Sums over tiles, and over as many matrices as are added, in fp64 and always in the same order. In scratch memory: a
// thread has one at a time.
class Totals {
 public:
  Totals(std::ptrdiff_t rows, std::ptrdiff_t columns)
      : rows_(rows),
        columns_(columns),
        row_sums_(reinterpret_cast<double*>(scratch<Totals>(sizeof(double) * kScores * (rows + columns)))),
        column_sums_(row_sums_ + kScores * rows) {
    std::fill_n(row_sums_, kScores * (rows + columns), 0.0);
    clear_statistics(statistics_);
  }

  Totals(const Totals&) = delete;

  template <class T>
  void add(const TileSums<T>& sums, int threads) {
    const std::ptrdiff_t row_runs = divide_up(kScores * rows_, kSumsAtOnce);
    const std::ptrdiff_t column_runs = divide_up(kScores * columns_, kSumsAtOnce);
    parallel_for(row_runs + column_runs, threads, [&](std::ptrdiff_t i) {
      if (i < row_runs)
        add_run(sums.row_sums, sums.column_tiles, i * kSumsAtOnce, row_sums_, kScores * rows_);
      else
        add_run(sums.column_sums, sums.row_tiles, (i - row_runs) * kSumsAtOnce, column_sums_, kScores * columns_);
    });
    const double* part = sums.statistics;
    for (std::ptrdiff_t k = 0; k < sums.tiles(); ++k, part += kStatistics) {
      statistics_[kSumAbs] += part[kSumAbs];
      statistics_[kSumSquare] += part[kSumSquare];
      statistics_[kMaxAbs] = std::max(statistics_[kMaxAbs], part[kMaxAbs]);
      statistics_[kMinAbs] = std::min(statistics_[kMinAbs], part[kMinAbs]);
      statistics_[kNonFinite] += part[kNonFinite];
    }
  }

  template <class T>
  void store(const TaylorOutputs& outputs) const {
    for (int s = 0; s < kScores; ++s) {
      std::copy_n(row_sums_ + s * rows_, rows_, static_cast<T*>(outputs.row[s]));
      std::copy_n(column_sums_ + s * columns_, columns_, static_cast<T*>(outputs.column[s]));
    }
    std::copy_n(statistics_, kStatistics, static_cast<T*>(outputs.statistics));
  }

 private:
  // Sums that one thread combines at a time.
  static constexpr std::ptrdiff_t kSumsAtOnce = 512;

  // totals[i] += parts[0][i] + parts[1][i] + ..., for the run of i from `first` on.
  template <class T>
  static void add_run(const T* parts, std::ptrdiff_t number, std::ptrdiff_t first, double* totals,
                      std::ptrdiff_t length) {
    const std::ptrdiff_t last = std::min(first + kSumsAtOnce, length);
    for (std::ptrdiff_t k = 0; k < number; ++k)
      for (std::ptrdiff_t i = first; i < last; ++i) totals[i] += parts[k * length + i];
  }

  std::ptrdiff_t rows_, columns_;
  double *row_sums_, *column_sums_;
  double statistics_[kStatistics];
};

}  // namespace gradprune
