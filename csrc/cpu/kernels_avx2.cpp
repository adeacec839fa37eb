// Kernels for AVX2 with FMA and F16C. This file is compiled for these instructions, and its kernels are called only if
// the CPU has them (isa.cpp).
#include "cpu/make_kernel_table.h"

namespace gradprune {

const KernelTable& avx2_kernels() {
#if defined(__AVX2__)
  static constexpr KernelTable table = make_kernel_table<32>();
  return table;
#else
  return scalar_kernels();
#endif
}

}  // namespace gradprune
