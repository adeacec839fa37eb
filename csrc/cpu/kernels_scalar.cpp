// Kernels for the architecture's baseline, with vectors of 16 bytes that the compiler lowers to SSE2, NEON or scalars.
#include "cpu/make_kernel_table.h"

namespace gradprune {

const KernelTable& scalar_kernels() {
  static constexpr KernelTable table = make_kernel_table<16>();
  return table;
}

}  // namespace gradprune
