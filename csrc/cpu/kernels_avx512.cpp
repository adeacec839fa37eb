// Kernels for AVX-512 F, BW, DQ and VL. This file is compiled for these instructions, and its kernels are called only
// if the CPU has them (isa.cpp).
#include "cpu/make_kernel_table.h"

namespace gradprune {

const KernelTable& avx512_kernels() {
#if defined(__AVX512F__)
  static constexpr KernelTable table = make_kernel_table<64>();
  return table;
#else
  return scalar_kernels();
#endif
}

}  // namespace gradprune
