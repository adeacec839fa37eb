// The inner kernels, one table an instruction set. The ops partition the work, call these, and combine in order.
#pragma once

#include <cstddef>

#include "cpu/element_type.h"
#include "cpu/isa.h"

namespace gradprune {

// Index of each statistic of a gradient; the order is that of gradprune.ops.vectors.STATISTICS.
enum Statistic { kSumAbs, kSumSquare, kMaxAbs, kMinAbs, kNonFinite, kStatistics };

// Index of each sum over a row or a column: of |w g|, of w g, of w^2 g^2.
enum Score { kAbs, kSigned, kSquare, kScores };

// The largest tile. Memory is read fastest along whole rows, so a tile is as wide as its column sums (3 x 4096 floats)
// fit into the second cache while its rows stream by. More rows would lengthen the fp32 sums, fewer would write more
// partial sums: at 120, a multiple of the rows taken at once, they are 1/60 of fp32 W and G.
constexpr std::ptrdiff_t kTileRows = 120;
constexpr std::ptrdiff_t kTileColumns = 4096;

// A rectangle of W and G, and where its sums go. row[s]: [rows], column[s]: [columns], of type float, or double
// where W and G are double. statistics: [kStatistics].
struct TaylorTile {
  const void* w;
  const void* g;
  std::ptrdiff_t w_stride, g_stride;  // between rows, in elements
  std::ptrdiff_t rows, columns;
  void* row[kScores];
  void* column[kScores];
  double* statistics;
};

// Panels [rows / panel rows, tokens, panel rows] of dY and likewise of X, and where their product g [rows, columns]
// goes. rows, columns: multiples of a panel's. All float, or all double.
struct GradientTile {
  const void* dy;
  const void* x;
  void* g;
  std::ptrdiff_t stride;  // between rows of g, in elements
  std::ptrdiff_t rows, columns, tokens;
};

// The `valid` columns from `from` on of a matrix [tokens, ...] into a panel, which is filled up with zeros.
using PackKernel = void (*)(const void* from, std::ptrdiff_t stride, std::ptrdiff_t tokens, std::ptrdiff_t valid,
                            void* panel);
using GradientTileKernel = void (*)(const GradientTile& tile);
using TaylorTileKernel = void (*)(const TaylorTile& tile);
using GradStatsKernel = void (*)(const void* g, std::ptrdiff_t count, double* statistics);
using ScaleKernel = void (*)(void* g, std::ptrdiff_t count, double scale);

struct KernelTable {
  TaylorTileKernel taylor_tile[kElementTypes][kElementTypes];  // by element type of W, of G; null if unsupported
  GradStatsKernel grad_stats[kElementTypes];
  ScaleKernel scale[kElementTypes];
  int panel_rows, panel_bytes;               // of dY: so many columns; of X: so many bytes of float or double
  PackKernel pack_dy[kElementTypes], pack_x[kElementTypes];
  GradientTileKernel gradient_tile[2];       // in float, in double
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
