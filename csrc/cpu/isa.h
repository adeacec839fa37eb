// Instruction sets that the kernels are compiled for, and which of them this CPU can run.
#pragma once

namespace gradprune {

// Scalar is the architecture's baseline (SSE2 on x86-64, NEON on AArch64), which every such CPU has.
enum class Isa { Scalar, Avx2, Avx512 };

// Whether an instruction set is compiled into this build and supported by this CPU and its operating system.
bool isa_available(Isa isa);

// The widest available instruction set.
Isa best_isa();

}  // namespace gradprune
