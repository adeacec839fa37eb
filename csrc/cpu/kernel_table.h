// The inner kernels, one table per instruction set. The ops divide the work among threads, call these kernels, and
// combine their results in a fixed order.
#pragma once

#include <cstddef>

#include "cpu/element_type.h"
#include "cpu/isa.h"
#include "gradient_statistics.h"

namespace gradprune {

// Indices of the two sums over a row or a column: of |w g| and of (w g)^2.
enum Score { kAbs, kSquare, kScores };

// Which sums an op is asked for: over rows, over columns, or both.
enum class Side : int { Rows, Columns, Both };
constexpr int kSides = 3;
constexpr bool has_rows(Side side) { return side != Side::Columns; }
constexpr bool has_columns(Side side) { return side != Side::Rows; }

// The largest tile. Memory is read fastest along whole rows, so a tile is as wide as it can be while its column sums
// (2 x 4096 floats) stay in the second-level cache and its rows stream by. More rows would make the fp32 sums longer,
// and fewer would write more partial sums; 120 is a multiple of every number of rows that one pass takes.
constexpr std::ptrdiff_t kTileRows = 120;
constexpr std::ptrdiff_t kTileColumns = 4096;

// A rectangle of W and G, and the addresses of its sums: row[s]: [rows], column[s]: [columns], float, or double if W
// and G are double; null for a side that is not asked for.
struct TaylorTile {
  Matrix w, g;
  std::ptrdiff_t rows, columns;
  void* row[kScores];
  void* column[kScores];
  Statistics* statistics;
};

// Panels of dY, [rows / panel width, tokens, panel width], and of X, [columns / panel width, tokens, panel width], and
// the address of their product g [rows, columns]. rows and columns are multiples of the panels' widths. All float, or
// all double.
struct GradientTile {
  const void* dy;
  const void* x;
  void* g;
  std::ptrdiff_t stride;  // between rows of g, in elements
  std::ptrdiff_t rows, columns, tokens;
};

// A strip of `mask_gradient`: its largest width, so that its sums stay in a core's own cache, and the number of tokens
// that are added in fp32 before their sums are added in fp64.
constexpr std::ptrdiff_t kMaskColumns = 1024;
constexpr std::ptrdiff_t kMaskTokens = 128;

// A strip of one sample's x and dx, [tokens, columns], both of one type, and the sums of x dx and of x^2 over the
// tokens, [columns] each, to which the kernel adds.
struct MaskStrip {
  const void* x;
  std::ptrdiff_t x_stride;  // between tokens, in elements
  const void* dx;
  std::ptrdiff_t dx_stride;
  std::ptrdiff_t tokens, columns;
  double* gradient;
  double* square;
};

// One removal of `cheapest_removals`: of `column`, after `done` others. s, d: [more than done, width]; the first `done`
// rows belong to the removals before. Row `done` of s (of d) holds the row of A^-1 (of M) of the column to remove, as
// it was before any removal, and is overwritten with this removal's s (d). inverse, gram: [width], the diagonals of
// A^-1 and of M, updated in place. width: a multiple of every vector's length.
struct Removal {
  double* s;
  double* d;
  std::ptrdiff_t done, width, column;
  double* inverse;
  double* gram;
};

// Copies the first `valid` columns at `from`, of a matrix [tokens, ...], into a panel, and fills the rest of it with
// zeros.
using PackKernel = void (*)(const void* from, std::ptrdiff_t stride, std::ptrdiff_t tokens, std::ptrdiff_t valid,
                            void* panel);
using GradientTileKernel = void (*)(const GradientTile& tile);
using TaylorTileKernel = void (*)(const TaylorTile& tile);
using GradStatsKernel = void (*)(const void* g, std::ptrdiff_t count, Statistics& into);
using MaskStripKernel = void (*)(const MaskStrip& strip);
using RemovalKernel = void (*)(const Removal& removal);
using ScaleKernel = void (*)(void* g, std::ptrdiff_t count, double scale);

// A table with one entry per value of an enum.
template <class Key, int KEYS, class Entry>
struct PerKey {
  Entry entry[KEYS];

  constexpr Entry& at(Key key) { return entry[static_cast<int>(key)]; }
  constexpr const Entry& at(Key key) const { return entry[static_cast<int>(key)]; }
};
template <class Entry>
using PerType = PerKey<ElementType, kElementTypes, Entry>;
template <class Entry>
using PerSide = PerKey<Side, kSides, Entry>;

struct KernelTable {
  PerSide<PerType<PerType<TaylorTileKernel>>> taylor_tile;  // by side, type of W, type of G; null if unsupported
  PerType<GradStatsKernel> grad_stats;
  PerType<ScaleKernel> scale;
  PerType<MaskStripKernel> mask_strip;
  RemovalKernel removal;
  PerType<PackKernel> pack_dy, pack_x;
  PerType<GradientTileKernel> gradient_tile;  // by the type it is computed in, Float32 or Float64
  int dy_panel_columns, x_panel_bytes;        // a panel's width: in columns of dY, in bytes of float or double of X
};

const KernelTable& scalar_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();

inline const KernelTable& kernels(Isa isa) {
  switch (isa) {
    case Isa::Avx512: return avx512_kernels();
    case Isa::Avx2: return avx2_kernels();
    case Isa::Scalar: break;
  }
  return scalar_kernels();
}

}  // namespace gradprune
