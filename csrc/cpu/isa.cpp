#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace gradprune {

#if defined(__x86_64__)
namespace {

// Reads CPUID directly, because not every compiler's __builtin_cpu_supports knows the name "f16c".
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::Avx512: return has_avx512();
    case Isa::Avx2: return has_avx2();
    case Isa::Scalar: return true;
  }
  return false;
}
#else
bool isa_available(Isa isa) { return isa == Isa::Scalar; }
#endif

Isa best_isa() {
  static const Isa best = isa_available(Isa::Avx512) ? Isa::Avx512 : isa_available(Isa::Avx2) ? Isa::Avx2 : Isa::Scalar;
  return best;
}

}  // namespace gradprune
