// Conversion of fp32, fp64, bf16 and fp16 elements to and from Vector lanes. Internal linkage, see vector.h.
#pragma once

#include "cpu/vector.h"

namespace gradprune {
namespace {

// The type that elements of type E are computed in.
template <class E> struct Accumulation { using type = float; };
template <> struct Accumulation<double> { using type = double; };

template <int N>
GRADPRUNE_INLINE typename Native<std::int32_t, N>::type widen(const void* from) {
  return __builtin_convertvector(load_bytes<typename Native<std::uint16_t, N>::type>(from),
                                 typename Native<std::int32_t, N>::type);
}

template <int N>
GRADPRUNE_INLINE void narrow(typename Native<std::int32_t, N>::type bits, void* to) {
  const auto low = __builtin_convertvector(bits, typename Native<std::uint16_t, N>::type);
  std::memcpy(to, &low, sizeof(low));
}

template <int N, class T>
GRADPRUNE_INLINE Vector<T, N> load_elements(const T* from) { return Vector<T, N>::load(from); }

template <int N, class T>
GRADPRUNE_INLINE void store_elements(Vector<T, N> x, T* to) { x.store(to); }

template <int N>
GRADPRUNE_INLINE Vector<float, N> load_elements(const BFloat16* from) {
  return {bit_cast<typename Native<float, N>::type>(widen<N>(from) << 16)};
}

// Round to nearest even: add just under half of the last kept bit, and that bit itself to break ties. The addition
// could carry a NaN into infinity or zero, so a NaN is truncated instead, with its quiet bit set.
template <int N>
GRADPRUNE_INLINE void store_elements(Vector<float, N> x, BFloat16* to) {
  using Unsigned = typename Native<std::uint32_t, N>::type;
  using Int = typename Native<std::int32_t, N>::type;
  const auto bits = bit_cast<Unsigned>(x.value);
  const Unsigned rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Unsigned nan = (bits >> 16) | 0x40;
  const Int is_nan = bit_cast<Int>(bits & 0x7fffffff) > Bits<float>::kInfinity;
  narrow<N>(bit_cast<Int>(is_nan ? nan : rounded), to);
}

// fp16 has an exponent bias of 15 and 10 mantissa bits. A subnormal is its mantissa times 2^-24: read with the exponent
// of 2^-14 it is 2^-14 too large, and subtracting that is exact.
template <int N>
GRADPRUNE_INLINE Vector<float, N> load_elements(const Float16* from) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
#endif
#if defined(__F16C__)
  if constexpr (N == 8) return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
#endif
  using Int = typename Native<std::int32_t, N>::type;
  using Float = typename Native<float, N>::type;
  const Int half = widen<N>(from);
  const Int shifted = (half & 0x7fff) << 13;
  const Int exponent = shifted & (31 << 23);
  const Int rebiased = shifted + ((127 - 15) << 23);
  const Int special = shifted | (255 << 23);
  const Float least_normal = bit_cast<Float>(Int{} + ((127 - 14) << 23));
  const Int subnormal = bit_cast<Int>(bit_cast<Float>(shifted | bit_cast<Int>(least_normal)) - least_normal);
  const Int magnitude = exponent == 0 ? subnormal : (exponent == (31 << 23) ? special : rebiased);
  return {bit_cast<Float>(magnitude | ((half & 0x8000) << 16))};
}

// Vector h (0 or 1) of the 2 N elements at `from`, for callers to which their order does not matter. Two bf16 share 32
// bits: a shift turns the lower one into its fp32 value, a mask the upper one. So vector 0 has the even elements and
// vector 1 the odd ones, in half the instructions that widening in order takes.
template <int N, class E>
GRADPRUNE_INLINE auto load_unordered(const E* from, int h) { return load_elements<N>(from + h * N); }

template <int N>
GRADPRUNE_INLINE Vector<float, N> load_unordered(const BFloat16* from, int h) {
  using Int = typename Native<std::int32_t, N>::type;
  const Int pairs = load_bytes<Int>(from);
  return {bit_cast<typename Native<float, N>::type>(h == 0 ? pairs << 16 : pairs & -0x10000)};
}

// Round to nearest even, as above. For magnitudes below 2^-14 the last kept bit is 2^-24. That is also the last
// mantissa bit of 1/2 in fp32, so adding 1/2 rounds to it.
template <int N>
GRADPRUNE_INLINE void store_elements(Vector<float, N> x, Float16* to) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m256i halves = _mm512_cvtps_ph(x.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(to, &halves, sizeof(halves));
    return;
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    const __m128i halves = _mm256_cvtps_ph(x.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(to, &halves, sizeof(halves));
    return;
  }
#endif
  using Int = typename Native<std::int32_t, N>::type;
  using Float = typename Native<float, N>::type;
  const Int bits = bit_cast<Int>(x.value);
  const Int magnitude = bits & 0x7fffffff;
  const Int normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Float half = Float{} + 0.5f;
  const Int subnormal = bit_cast<Int>(bit_cast<Float>(magnitude) + half) - bit_cast<Int>(half);
  const Int infinity = Int{} + 0x7c00;
  const Int nan = ((magnitude >> 13) & 0x3ff) | 0x7e00;
  const Int finite = magnitude < ((127 - 14) << 23) ? subnormal : normal;
  const Int unsigned_half =
      magnitude > Bits<float>::kInfinity ? nan : (magnitude >= ((127 + 16) << 23) ? infinity : finite);
  narrow<N>(unsigned_half | ((bits >> 16) & 0x8000), to);
}

}  // namespace
}  // namespace gradprune
