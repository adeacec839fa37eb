// taylor_score of one tile. Internal linkage, see vector.h.
//
//   row[kAbs][o]    = sum_i |w g|        column[kAbs][i]    = sum_o |w g|
//   row[kSquare][o] = sum_i (w g)^2      column[kSquare][i] = sum_o (w g)^2
//
// Each pass takes ROWS rows that are tile.rows / ROWS apart: the next pass then continues every one of the ROWS read
// streams with the row that follows in memory, so that all of them stay sequential. A pass goes over the columns in
// steps of two vectors. Row sums stay in registers; column sums stay in the first-level cache and are loaded and stored
// once per pass.
#pragma once

#include <type_traits>

#include "cpu/kernel_table.h"
#include "cpu/statistics_kernel.h"

namespace gradprune {
namespace {

// The number of rows that a pass takes. The sums of four rows fit in AVX-512's 32 registers, those of two in 16
// registers. If elements of W or G are wider than 16 bits, a pass takes three, because memory serves four such streams
// more slowly.
template <class W, class G>
constexpr int rows_at_once(int bytes) {
  if (bytes < 64) return 2;
  return sizeof(W) + sizeof(G) == 4 ? 4 : 3;
}
constexpr int kCacheLine = 64;
// How many bytes of W to prefetch ahead, and as many columns of G. Hardware prefetchers stop at every page, and at the
// end of a row if the tile is narrower than its matrix.
constexpr int kFetchedAhead = 1024;

// Columns are read out of order if W and G are both bf16: it is faster, and both come in the same order.
template <class W, class G>
constexpr bool kUnordered = std::is_same_v<W, BFloat16> && std::is_same_v<G, BFloat16>;

// Vector h (0 or 1) of the 2 N elements at `from`.
template <int N, bool UNORDERED, class E>
GRADPRUNE_INLINE auto load_half(const E* from, int h) {
  if constexpr (UNORDERED)
    return load_unordered<N>(from, h);
  else
    return load_elements<N>(from + h * N);
}

// Pointers to the ROWS rows `row`, `row` + `apart`, ... of a tile. They are local variables, because for all that the
// compiler knows, a store to a column sum could change pointers in the tile.
template <class W, class G, int ROWS>
struct RowPointers {
  const W* w[ROWS];
  const G* g[ROWS];

  GRADPRUNE_INLINE RowPointers(const TaylorTile& tile, std::ptrdiff_t row, std::ptrdiff_t apart) {
    for (int r = 0; r < ROWS; ++r) {
      w[r] = static_cast<const W*>(tile.w.data) + (row + r * apart) * tile.w.stride;
      g[r] = static_cast<const G*>(tile.g.data) + (row + r * apart) * tile.g.stride;
    }
  }

  // Prefetches every cache line of COLUMNS columns, the first of which is `column`.
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

// The sums of ROWS rows, in vector lanes that are still to be reduced.
template <class V, int ROWS>
struct RowSums {
  V abs[ROWS], square[ROWS];

  GRADPRUNE_INLINE RowSums() {
    for (int r = 0; r < ROWS; ++r) abs[r] = square[r] = V::zero();
  }
};

// Adds one vector of columns of ROWS rows to the row sums in `rows`, to the column sums at column_sums (kScores vectors
// side by side), and to the statistics.
template <Side SIDE, class V, int ROWS>
GRADPRUNE_INLINE void accumulate(const V (&w)[ROWS], const V (&g)[ROWS], RowSums<V, ROWS>& rows,
                                 typename V::T* column_sums, FiniteStatistics<V>& statistics) {
  typename V::T *abs_at = column_sums + kAbs * V::kLanes, *square_at = column_sums + kSquare * V::kLanes;
  V column_abs = V::zero(), column_square = V::zero();
  if constexpr (has_columns(SIDE)) column_abs = V::load(abs_at), column_square = V::load(square_at);
  for (int r = 0; r < ROWS; ++r) {
    const V product = w[r] * g[r], magnitude = abs(product);
    if constexpr (has_rows(SIDE)) {
      rows.abs[r] = rows.abs[r] + magnitude;
      rows.square[r] = multiply_add(product, product, rows.square[r]);
    }
    if constexpr (has_columns(SIDE)) {
      column_abs = column_abs + magnitude;
      column_square = multiply_add(product, product, column_square);
    }
  }
  if constexpr (has_columns(SIDE)) column_abs.store(abs_at), column_square.store(square_at);
  statistics.add(g);
}

// One pass over the ROWS rows `row`, `row` + `apart`, ... `next`: the first row of the next pass, for prefetching.
template <Side SIDE, int N, int ROWS, class T, class W, class G>
GRADPRUNE_INLINE void taylor_rows(const TaylorTile& tile, std::ptrdiff_t row, std::ptrdiff_t apart,
                                  std::ptrdiff_t next, T* column_sums) {
  constexpr int kStep = 2 * N;
  constexpr std::ptrdiff_t kAhead = kFetchedAhead / static_cast<int>(sizeof(W));
  const std::ptrdiff_t ahead = kAhead < tile.columns ? kAhead : tile.columns;
  const RowPointers<W, G, ROWS> at(tile, row, apart), then(tile, next, apart);
  RowSums<Vector<T, N>, ROWS> wide;
  RowSums<Vector<T, 1>, ROWS> narrow;
  RunStatistics<T, N> statistics;
  std::ptrdiff_t i = 0;
  for (; i + kStep <= tile.columns; i += kStep) {
    if (i + ahead < tile.columns)
      at.template prefetch<kStep>(i + ahead);
    else
      then.template prefetch<kStep>(i + ahead - tile.columns);
    for (int h = 0; h < 2; ++h) {
      Vector<T, N> w[ROWS], g[ROWS];
      for (int r = 0; r < ROWS; ++r) {
        w[r] = load_half<N, kUnordered<W, G>>(at.w[r] + i, h);
        g[r] = load_half<N, kUnordered<W, G>>(at.g[r] + i, h);
      }
      accumulate<SIDE>(w, g, wide, column_sums + kScores * (i + h * N), statistics.wide);
    }
  }
  for (; i < tile.columns; ++i) {
    Vector<T, 1> w[ROWS], g[ROWS];
    for (int r = 0; r < ROWS; ++r) w[r] = load_elements<1>(at.w[r] + i), g[r] = load_elements<1>(at.g[r] + i);
    accumulate<SIDE>(w, g, narrow, column_sums + kScores * i, statistics.narrow);
  }
  if constexpr (has_rows(SIDE))
    for (int r = 0; r < ROWS; ++r) {
      static_cast<T*>(tile.row[kAbs])[row + r * apart] = reduce(wide.abs[r], Add{}) + narrow.abs[r].value[0];
      static_cast<T*>(tile.row[kSquare])[row + r * apart] = reduce(wide.square[r], Add{}) + narrow.square[r].value[0];
    }
  if (!statistics.merge_if_finite(*tile.statistics))
    for (const G* g : at.g) masked_statistics(g, tile.columns, *tile.statistics);
}

// Copies the column sums from the layout of `taylor_rows` to one array per score, with the columns in order.
template <class T, int N, bool UNORDERED>
void store_column_sums(const T* sums, const TaylorTile& tile) {
  for (int s = 0; s < kScores; ++s) {
    T* column = static_cast<T*>(tile.column[s]);
    const std::ptrdiff_t whole = tile.columns / (2 * N) * (2 * N);
    for (std::ptrdiff_t i = 0; i < whole; i += 2 * N) {
      const T* first = sums + kScores * i + s * N;
      const T* second = first + kScores * N;
      for (int k = 0; k < N; ++k) {
        column[i + (UNORDERED ? 2 * k : k)] = first[k];
        column[i + (UNORDERED ? 2 * k + 1 : N + k)] = second[k];
      }
    }
    for (std::ptrdiff_t i = whole; i < tile.columns; ++i) column[i] = sums[kScores * i + s];
  }
}

// The column sums of both scores are interleaved, vector by vector. As two arrays a power of two apart they would
// compete for the same cache sets, and a load would wait for a store whose address differs only in the upper bits (4K
// aliasing).
template <class W, class G, int BYTES, Side SIDE>
void taylor_tile(const TaylorTile& tile) {
  using T = typename Accumulation<W>::type;
  constexpr int N = BYTES / static_cast<int>(sizeof(T)), ROWS = rows_at_once<W, G>(BYTES);
  alignas(BYTES) T column_sums[has_columns(SIDE) ? kScores * kTileColumns : 1];
  if constexpr (has_columns(SIDE))
    std::memset(column_sums, 0, sizeof(T) * kScores * static_cast<std::size_t>(tile.columns));
  const std::ptrdiff_t apart = tile.rows / ROWS, last = tile.rows - 1;
  for (std::ptrdiff_t row = 0; row < apart; ++row)
    taylor_rows<SIDE, N, ROWS, T, W, G>(tile, row, apart, row + 1 < apart ? row + 1 : row, column_sums);
  for (std::ptrdiff_t row = apart * ROWS; row <= last; ++row)
    taylor_rows<SIDE, N, 1, T, W, G>(tile, row, 0, row < last ? row + 1 : row, column_sums);
  if constexpr (has_columns(SIDE)) store_column_sums<T, N, kUnordered<W, G>>(column_sums, tile);
}

}  // namespace
}  // namespace gradprune
