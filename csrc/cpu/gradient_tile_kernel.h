// A tile of one sample's weight gradient G = dY^T X. Internal linkage, see vector.h.
//
// X [tokens, columns] and dY [tokens, rows] are first packed into panels, as in other GEMMs: a few neighbouring columns
// of the matrix, token by token, in fp32 (fp64 for fp64), padded with zeros. The product of a panel of dY and a panel
// of X stays in registers while the tokens stream by.
#pragma once

#include "cpu/element_io.h"
#include "cpu/kernel_table.h"

namespace gradprune {
namespace {

// Register block: ROWS x 2 accumulator vectors. The remaining registers hold a broadcast element of dY and two vectors
// of X.
constexpr int rows_of_panel(int bytes) { return bytes == 64 ? 12 : 6; }
constexpr int kVectorsOfPanel = 2;
// The product is formed this many tokens at a time, so that a panel of X stays in the first-level cache and a tile's
// panels of dY in the second-level cache.
constexpr std::ptrdiff_t kTokensAtOnce = 256;

// Copies the first `valid` columns at `from` into a panel [tokens, WIDTH], and fills its other columns with zeros.
template <class E, int N, int WIDTH>
GRADPRUNE_INLINE void pack_panel(const E* from, std::ptrdiff_t stride, std::ptrdiff_t tokens, std::ptrdiff_t valid,
                                 typename Accumulation<E>::type* panel) {
  constexpr int kWhole = WIDTH / N * N;
  for (std::ptrdiff_t t = 0; t < tokens; ++t, from += stride, panel += WIDTH) {
    if (valid == WIDTH) {
      for (int k = 0; k < kWhole; k += N) load_elements<N>(from + k).store(panel + k);
      for (int k = kWhole; k < WIDTH; ++k) load_elements<1>(from + k).store(panel + k);
    } else {
      for (int k = 0; k < WIDTH; ++k) panel[k] = k < valid ? load_elements<1>(from + k).value[0] : 0;
    }
  }
}

template <class E, int BYTES>
void pack_dy(const void* from, std::ptrdiff_t stride, std::ptrdiff_t tokens, std::ptrdiff_t valid, void* panel) {
  using T = typename Accumulation<E>::type;
  // A panel of dY is narrower than a vector, or not a whole number of vectors wide; two elements at a time divide it.
  constexpr int N = 2;
  pack_panel<E, N, rows_of_panel(BYTES)>(static_cast<const E*>(from), stride, tokens, valid, static_cast<T*>(panel));
}

template <class E, int BYTES>
void pack_x(const void* from, std::ptrdiff_t stride, std::ptrdiff_t tokens, std::ptrdiff_t valid, void* panel) {
  using T = typename Accumulation<E>::type;
  constexpr int N = BYTES / static_cast<int>(sizeof(T));
  pack_panel<E, N, kVectorsOfPanel * N>(static_cast<const E*>(from), stride, tokens, valid, static_cast<T*>(panel));
}

// g[r][c] = (or with `add` +=) sum over tokens t of dy[t][r] x[t][c], for one panel of dY and one of X.
template <class V, int ROWS>
GRADPRUNE_INLINE void multiply_panels(const typename V::T* dy, const typename V::T* x, std::ptrdiff_t tokens,
                                      typename V::T* g, std::ptrdiff_t stride, bool add) {
  constexpr int N = V::kLanes;
  V sum[ROWS][kVectorsOfPanel];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < kVectorsOfPanel; ++v) sum[r][v] = add ? V::load(g + r * stride + v * N) : V::zero();
  for (std::ptrdiff_t t = 0; t < tokens; ++t, dy += ROWS, x += kVectorsOfPanel * N) {
    V columns[kVectorsOfPanel];
    for (int v = 0; v < kVectorsOfPanel; ++v) columns[v] = V::load(x + v * N);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const V row = V::broadcast(dy[r]);
      for (int v = 0; v < kVectorsOfPanel; ++v) sum[r][v] = multiply_add(row, columns[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < kVectorsOfPanel; ++v) sum[r][v].store(g + r * stride + v * N);
}

template <class T, int BYTES>
void gradient_tile(const GradientTile& tile) {
  constexpr int N = BYTES / static_cast<int>(sizeof(T)), ROWS = rows_of_panel(BYTES), COLUMNS = kVectorsOfPanel * N;
  const T* dy = static_cast<const T*>(tile.dy);
  const T* x = static_cast<const T*>(tile.x);
  T* g = static_cast<T*>(tile.g);
  std::ptrdiff_t first = 0;
  do {  // at least once: without tokens G must still be set to zero
    const std::ptrdiff_t tokens = tile.tokens - first < kTokensAtOnce ? tile.tokens - first : kTokensAtOnce;
    for (std::ptrdiff_t c = 0; c < tile.columns; c += COLUMNS)
      for (std::ptrdiff_t r = 0; r < tile.rows; r += ROWS)
        multiply_panels<Vector<T, N>, ROWS>(dy + r * tile.tokens + first * ROWS, x + c * tile.tokens + first * COLUMNS,
                                            tokens, g + r * tile.stride + c, tile.stride, first > 0);
    first += kTokensAtOnce;
  } while (first < tile.tokens);
}

}  // namespace
}  // namespace gradprune
