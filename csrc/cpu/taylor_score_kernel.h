// taylor_score of one tile. Internal linkage, as vector.h.
//
//   row[kAbs][o]    = sum_i |w g|        column[kAbs][i]    = sum_o |w g|
//   row[kSigned][o] = sum_i  w g         column[kSigned][i] = sum_o  w g
//   row[kSquare][o] = sum_i (w g)^2      column[kSquare][i] = sum_o (w g)^2
//
// Two to four rows are taken at once, columns in steps of two vectors. Row sums stay in registers; column sums stay in
// the nearest cache, read and written once for these rows. The rows lie a half, a third or a quarter of the tile apart:
// each is then followed by its neighbour, and a tile as wide as its matrix is read in so many unbroken runs.
#pragma once

#include "cpu/statistics_kernel.h"

namespace gradprune {
namespace {

// With 32 registers, of 64 bytes, there is room for four, with 16 for two. Where elements have more than 16 bits it is
// three: memory serves more runs at once more slowly.
template <class W, class G>
constexpr int rows_at_once(int bytes) {
  if (bytes < 64) return 2;
  return sizeof(W) + sizeof(G) == 4 ? 4 : 3;
}
constexpr int kCacheLine = 64;
// A run is fetched so many bytes of W ahead: what a hardware prefetcher leaves behind at every page, and at every row
// where the tile is narrower than its matrix.
constexpr int kFetchedAhead = 1024;

// How a vector h of 2 N columns is read: in order, or, where W and G both allow it, in the quicker order they share.
template <class W, class G, int N>
struct StepLayout {
  static constexpr bool kInterleaved = false;
  template <class E>
  static GRADPRUNE_INLINE auto load(const E* from, int h) { return load_elements<N>(from + h * N); }
};

template <int N>
struct StepLayout<BFloat16, BFloat16, N> {
  static constexpr bool kInterleaved = true;
  static GRADPRUNE_INLINE auto load(const BFloat16* from, int h) { return load_unordered<N>(from, h); }
};

template <class V, int ROWS>
struct RowSums {
  V sum[kScores][ROWS];

  GRADPRUNE_INLINE RowSums() {
    for (auto& score : sum)
      for (auto& row : score) row = V::zero();
  }
};

// ROWS rows of a tile from `row` on, `apart` rows apart. Copied into locals, so that a store to a column sum cannot be
// thought to change a pointer.
template <class W, class G, int ROWS>
struct RowPointers {
  const W* w[ROWS];
  const G* g[ROWS];

  GRADPRUNE_INLINE RowPointers(const TaylorTile& tile, std::ptrdiff_t row, std::ptrdiff_t apart) {
    for (int r = 0; r < ROWS; ++r) {
      w[r] = static_cast<const W*>(tile.w) + (row + r * apart) * tile.w_stride;
      g[r] = static_cast<const G*>(tile.g) + (row + r * apart) * tile.g_stride;
    }
  }

  // Every cache line of COLUMNS columns from `column` on.
  template <int COLUMNS>
  GRADPRUNE_INLINE void prefetch(std::ptrdiff_t column) const {
    for (int r = 0; r < ROWS; ++r) {
      prefetch_lines<COLUMNS>(w[r] + column);
      prefetch_lines<COLUMNS>(g[r] + column);
    }
  }

 private:
  template <int COUNT, class E>
  static GRADPRUNE_INLINE void prefetch_lines(const E* from) {
    constexpr int kElements = kCacheLine / static_cast<int>(sizeof(E));
    for (int k = 0; k < COUNT; k += kElements) __builtin_prefetch(from + k, 0, 3);
  }
};

// One vector of columns: `load` reads it from a pointer to column `column`, and its three column sums are at `sums`.
template <class V, class W, class G, int ROWS, class Load>
GRADPRUNE_INLINE void accumulate(const RowPointers<W, G, ROWS>& at, std::ptrdiff_t column, Load load,
                                 typename V::T* sums, RowSums<V, ROWS>& rows, FiniteStatistics<V>& statistics) {
  constexpr int N = V::kLanes;
  V g[ROWS];
  V column_abs = V::load(sums + kAbs * N), column_signed = V::load(sums + kSigned * N);
  V column_square = V::load(sums + kSquare * N);
  for (int r = 0; r < ROWS; ++r) {
    g[r] = load(at.g[r] + column);
    const V product = load(at.w[r] + column) * g[r];
    const V magnitude = abs(product);
    rows.sum[kAbs][r] = rows.sum[kAbs][r] + magnitude;
    rows.sum[kSigned][r] = rows.sum[kSigned][r] + product;
    rows.sum[kSquare][r] = multiply_add(product, product, rows.sum[kSquare][r]);
    column_abs = column_abs + magnitude;
    column_signed = column_signed + product;
    column_square = multiply_add(product, product, column_square);
  }
  column_abs.store(sums + kAbs * N);
  column_signed.store(sums + kSigned * N);
  column_square.store(sums + kSquare * N);
  statistics.add(g);
}

// ROWS rows of the tile, from `row` on and `apart` rows apart. `next`: the first of those that come then.
template <class T, class W, class G, int N, int ROWS>
GRADPRUNE_INLINE void taylor_rows(const TaylorTile& tile, std::ptrdiff_t row, std::ptrdiff_t apart,
                                  std::ptrdiff_t next, T* sums) {
  using Layout = StepLayout<W, G, N>;
  using Pointers = RowPointers<W, G, ROWS>;
  RowSums<Vector<T, N>, ROWS> wide;
  RowSums<Vector<T, 1>, ROWS> narrow;
  RunStatistics<T, N> statistics;
  constexpr std::ptrdiff_t kAhead = kFetchedAhead / static_cast<int>(sizeof(W));
  const std::ptrdiff_t ahead = kAhead < tile.columns ? kAhead : tile.columns;
  const Pointers at(tile, row, apart), then(tile, next, apart);
  const auto first = [](const auto* x) { return Layout::load(x, 0); };
  const auto second = [](const auto* x) { return Layout::load(x, 1); };
  const auto single = [](const auto* x) { return load_elements<1>(x); };
  std::ptrdiff_t i = 0;
  for (; i + 2 * N <= tile.columns; i += 2 * N) {
    if (i + ahead < tile.columns)
      at.template prefetch<2 * N>(i + ahead);
    else
      then.template prefetch<2 * N>(i + ahead - tile.columns);
    accumulate(at, i, first, sums + kScores * i, wide, statistics.wide);
    accumulate(at, i, second, sums + kScores * (i + N), wide, statistics.wide);
  }
  for (; i < tile.columns; ++i) accumulate(at, i, single, sums + kScores * i, narrow, statistics.narrow);

  for (int s = 0; s < kScores; ++s)
    for (int r = 0; r < ROWS; ++r)
      static_cast<T*>(tile.row[s])[row + r * apart] = reduce(wide.sum[s][r], Add{}) + narrow.sum[s][r].value[0];
  if (!statistics.merge_if_finite(tile.statistics))
    for (const G* g : at.g) masked_statistics(g, tile.columns, tile.statistics);
}

// Column sums as `taylor_rows` leaves them, to one vector a score with the columns in order.
template <class T, int N, bool INTERLEAVED>
void store_column_sums(const T* sums, const TaylorTile& tile) {
  for (int s = 0; s < kScores; ++s) {
    T* column = static_cast<T*>(tile.column[s]);
    const std::ptrdiff_t whole = tile.columns / (2 * N) * (2 * N);
    for (std::ptrdiff_t i = 0; i < whole; i += 2 * N) {
      const T* first = sums + kScores * i + s * N;
      const T* second = first + kScores * N;
      for (int k = 0; k < N; ++k) {
        column[i + (INTERLEAVED ? 2 * k : k)] = first[k];
        column[i + (INTERLEAVED ? 2 * k + 1 : N + k)] = second[k];
      }
    }
    for (std::ptrdiff_t i = whole; i < tile.columns; ++i) column[i] = sums[kScores * i + s];
  }
}

// The sums of each vector of columns lie side by side. In three arrays a power of two apart they would compete for
// the same lines of the cache, and a load would wait for a store that only looks to be to its address.
template <class W, class G, int BYTES>
void taylor_tile(const TaylorTile& tile) {
  using T = typename Accumulation<W>::type;
  constexpr int N = BYTES / static_cast<int>(sizeof(T));
  alignas(BYTES) T sums[kScores * kTileColumns];
  std::memset(sums, 0, sizeof(T) * kScores * static_cast<std::size_t>(tile.columns));
  constexpr int ROWS = rows_at_once<W, G>(BYTES);
  const std::ptrdiff_t apart = tile.rows / ROWS, last = tile.rows - 1;
  for (std::ptrdiff_t row = 0; row < apart; ++row)
    taylor_rows<T, W, G, N, ROWS>(tile, row, apart, row + 1 < apart ? row + 1 : row, sums);
  for (std::ptrdiff_t row = apart * ROWS; row <= last; ++row)
    taylor_rows<T, W, G, N, 1>(tile, row, 0, row < last ? row + 1 : row, sums);
  store_column_sums<T, N, StepLayout<W, G, N>::kInterleaved>(sums, tile);
}

}  // namespace
}  // namespace gradprune
