// Row and column sums and statistics of a matrix that is processed in tiles: those of each tile, and their totals.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace gradprune {

inline std::ptrdiff_t divide_up(std::ptrdiff_t n, std::ptrdiff_t by) { return (n + by - 1) / by; }

// row[s]: [rows], column[s]: [columns], only of `side`; statistics: [kStatistics]. All float, or double if W and G are
// double.
struct TaylorOutputs {
  Side side;
  void* row[kScores];
  void* column[kScores];
  void* statistics;
};

// The grid of tiles over [rows, columns] and the sums of each: row sums [column tiles, kScores, rows], column sums
// [row tiles, kScores, columns], statistics [tiles]. A side that is not asked for takes no memory. They are in scratch
// memory, so a thread can have only one object of this class at a time.
template <class T>
struct TileSums {
  Side side;
  std::ptrdiff_t rows, columns, tile_rows, tile_columns, row_tiles, column_tiles;
  Statistics* statistics;
  T *row_sums, *column_sums;

  TileSums(Side side, std::ptrdiff_t rows, std::ptrdiff_t columns, std::ptrdiff_t tile_rows,
           std::ptrdiff_t tile_columns)
      : side(side),
        rows(rows),
        columns(columns),
        tile_rows(tile_rows),
        tile_columns(tile_columns),
        row_tiles(divide_up(rows, tile_rows)),
        column_tiles(divide_up(columns, tile_columns)) {
    const std::ptrdiff_t of_rows = has_rows(side) ? column_tiles * kScores * rows : 0;
    const std::ptrdiff_t of_columns = has_columns(side) ? row_tiles * kScores * columns : 0;
    std::byte* memory = scratch<TileSums>(sizeof(Statistics) * tiles() + sizeof(T) * (of_rows + of_columns));
    statistics = reinterpret_cast<Statistics*>(memory);
    row_sums = reinterpret_cast<T*>(statistics + tiles());
    column_sums = row_sums + of_rows;
  }

  TileSums(const TileSums&) = delete;

  std::ptrdiff_t tiles() const { return row_tiles * column_tiles; }

  // The first row and the first column of tile number `index`.
  std::ptrdiff_t row(std::ptrdiff_t index) const { return index / column_tiles * tile_rows; }
  std::ptrdiff_t column(std::ptrdiff_t index) const { return index % column_tiles * tile_columns; }

  // Tile number `index`, whose parts of W and G are `w` and `g`, with cleared statistics.
  TaylorTile tile(std::ptrdiff_t index, const Matrix& w, const Matrix& g) const {
    TaylorTile tile{};
    tile.w = w;
    tile.g = g;
    tile.rows = std::min(tile_rows, rows - row(index));
    tile.columns = std::min(tile_columns, columns - column(index));
    for (int s = 0; s < kScores; ++s) {
      if (has_rows(side)) tile.row[s] = row_sums + (index % column_tiles * kScores + s) * rows + row(index);
      if (has_columns(side))
        tile.column[s] = column_sums + (index / column_tiles * kScores + s) * columns + column(index);
    }
    tile.statistics = statistics + index;
    *tile.statistics = no_statistics();
    return tile;
  }
};

// Sums over the tiles of one or more matrices, in fp64 and always in the same order. They are in scratch memory, so a
// thread can have only one object of this class at a time.
class Totals {
 public:
  Totals(Side side, std::ptrdiff_t rows, std::ptrdiff_t columns)
      : rows_(has_rows(side) ? rows : 0),
        columns_(has_columns(side) ? columns : 0),
        row_sums_(reinterpret_cast<double*>(scratch<Totals>(sizeof(double) * kScores * (rows_ + columns_)))),
        column_sums_(row_sums_ + kScores * rows_) {
    std::fill_n(row_sums_, kScores * (rows_ + columns_), 0.0);
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
    for (std::ptrdiff_t k = 0; k < sums.tiles(); ++k) merge(statistics_, sums.statistics[k]);
  }

  template <class T>
  void store(const TaylorOutputs& outputs) const {
    for (int s = 0; s < kScores; ++s) {
      std::copy_n(row_sums_ + s * rows_, rows_, static_cast<T*>(outputs.row[s]));
      std::copy_n(column_sums_ + s * columns_, columns_, static_cast<T*>(outputs.column[s]));
    }
    const Statistics& s = statistics_;
    const double values[kStatistics] = {s.sum_abs, s.sum_square, s.max_abs, s.min_abs, s.non_finite};
    std::copy_n(values, kStatistics, static_cast<T*>(outputs.statistics));
  }

 private:
  // The number of totals that one thread computes at a time.
  static constexpr std::ptrdiff_t kSumsAtOnce = 512;

  // Adds parts[0][i], parts[1][i], ... to totals[i], in this order, for at most kSumsAtOnce values of i from `first`
  // on.
  template <class T>
  static void add_run(const T* parts, std::ptrdiff_t number, std::ptrdiff_t first, double* totals,
                      std::ptrdiff_t length) {
    const std::ptrdiff_t last = std::min(first + kSumsAtOnce, length);
    for (std::ptrdiff_t k = 0; k < number; ++k)
      for (std::ptrdiff_t i = first; i < last; ++i) totals[i] += parts[k * length + i];
  }

  std::ptrdiff_t rows_, columns_;
  double *row_sums_, *column_sums_;
  Statistics statistics_ = no_statistics();
};

}  // namespace gradprune
