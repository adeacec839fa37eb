// Builds the table of kernels for vectors of BYTES bytes. Included once by each kernels_<isa>.cpp. Internal linkage,
// see vector.h.
#pragma once

#include "cpu/cheapest_removals_kernel.h"
#include "cpu/gradient_kernels.h"
#include "cpu/gradient_tile_kernel.h"
#include "cpu/mask_gradient_kernel.h"
#include "cpu/taylor_score_kernel.h"

namespace gradprune {
namespace {

template <class E> constexpr ElementType kTypeOf = ElementType::Float32;
template <> constexpr ElementType kTypeOf<BFloat16> = ElementType::BFloat16;
template <> constexpr ElementType kTypeOf<Float16> = ElementType::Float16;
template <> constexpr ElementType kTypeOf<double> = ElementType::Float64;

template <int BYTES, class W, class G>
constexpr void add_taylor_tile(KernelTable& table) {
  constexpr ElementType w = kTypeOf<W>, g = kTypeOf<G>;
  table.taylor_tile.at(Side::Rows).at(w).at(g) = taylor_tile<W, G, BYTES, Side::Rows>;
  table.taylor_tile.at(Side::Columns).at(w).at(g) = taylor_tile<W, G, BYTES, Side::Columns>;
  table.taylor_tile.at(Side::Both).at(w).at(g) = taylor_tile<W, G, BYTES, Side::Both>;
}

template <int BYTES, class E>
constexpr void add_type(KernelTable& table) {
  constexpr ElementType type = kTypeOf<E>;
  table.grad_stats.at(type) = grad_stats<E, BYTES>;
  table.scale.at(type) = scale<E, BYTES>;
  table.mask_strip.at(type) = mask_strip<E, BYTES>;
  table.pack_dy.at(type) = pack_dy<E, BYTES>;
  table.pack_x.at(type) = pack_x<E, BYTES>;
}

template <int BYTES, class W>
constexpr void add_half_precision_or_float(KernelTable& table) {
  add_type<BYTES, W>(table);
  add_taylor_tile<BYTES, W, float>(table);
  add_taylor_tile<BYTES, W, BFloat16>(table);
  add_taylor_tile<BYTES, W, Float16>(table);
}

template <int BYTES>
constexpr KernelTable make_kernel_table() {
  KernelTable table{};
  add_half_precision_or_float<BYTES, float>(table);
  add_half_precision_or_float<BYTES, BFloat16>(table);
  add_half_precision_or_float<BYTES, Float16>(table);
  add_type<BYTES, double>(table);
  add_taylor_tile<BYTES, double, double>(table);
  table.gradient_tile.at(ElementType::Float32) = gradient_tile<float, BYTES>;
  table.gradient_tile.at(ElementType::Float64) = gradient_tile<double, BYTES>;
  table.removal = removal<BYTES>;
  table.dy_panel_columns = rows_of_panel(BYTES);
  table.x_panel_bytes = kVectorsOfPanel * BYTES;
  return table;
}

}  // namespace
}  // namespace gradprune
