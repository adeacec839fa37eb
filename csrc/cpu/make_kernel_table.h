// The table of kernels for vectors of BYTES bytes. Included once by each kernels_<isa>.cpp. Internal linkage.
#pragma once

#include "cpu/gradient_kernels.h"
#include "cpu/gradient_tile_kernel.h"
#include "cpu/taylor_score_kernel.h"

namespace gradprune {
namespace {

template <int BYTES>
constexpr KernelTable make_kernel_table() {
  using B = BFloat16;
  using H = Float16;
  return {
      // Rows: W in fp32, bf16, fp16, fp64. Columns: G in the same order.
      {{taylor_tile<float, float, BYTES>, taylor_tile<float, B, BYTES>, taylor_tile<float, H, BYTES>, nullptr},
       {taylor_tile<B, float, BYTES>, taylor_tile<B, B, BYTES>, taylor_tile<B, H, BYTES>, nullptr},
       {taylor_tile<H, float, BYTES>, taylor_tile<H, B, BYTES>, taylor_tile<H, H, BYTES>, nullptr},
       {nullptr, nullptr, nullptr, taylor_tile<double, double, BYTES>}},
      {grad_stats<float, BYTES>, grad_stats<B, BYTES>, grad_stats<H, BYTES>, grad_stats<double, BYTES>},
      {scale<float, BYTES>, scale<B, BYTES>, scale<H, BYTES>, scale<double, BYTES>},
      rows_of_panel(BYTES),
      kVectorsOfPanel * BYTES,
      {pack_dy<float, BYTES>, pack_dy<B, BYTES>, pack_dy<H, BYTES>, pack_dy<double, BYTES>},
      {pack_x<float, BYTES>, pack_x<B, BYTES>, pack_x<H, BYTES>, pack_x<double, BYTES>},
      {gradient_tile<float, BYTES>, gradient_tile<double, BYTES>},
  };
}

}  // namespace
}  // namespace gradprune
