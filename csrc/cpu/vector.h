// Vector<T, N>: N lanes of float or double, built on GCC's vector extensions, so that one source serves every
// instruction set: the file that includes this header is compiled for AVX-512, AVX2 or the baseline, and chooses N.
//
// Everything here has internal linkage, because two files compiled for different instruction sets must not share a
// symbol: the linker would keep only one definition, which some CPUs might not be able to run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/element_type.h"

#define GRADPRUNE_INLINE inline __attribute__((always_inline))

namespace gradprune {
namespace {

template <class T, int N> struct Native;
template <int N> struct Native<float, N> { typedef float type __attribute__((vector_size(4 * N))); };
template <int N> struct Native<double, N> { typedef double type __attribute__((vector_size(8 * N))); };
template <int N> struct Native<std::int32_t, N> { typedef std::int32_t type __attribute__((vector_size(4 * N))); };
template <int N> struct Native<std::uint32_t, N> { typedef std::uint32_t type __attribute__((vector_size(4 * N))); };
template <int N> struct Native<std::int64_t, N> { typedef std::int64_t type __attribute__((vector_size(8 * N))); };
template <int N> struct Native<std::uint16_t, N> { typedef std::uint16_t type __attribute__((vector_size(2 * N))); };

template <class To, class From>
GRADPRUNE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class To>
GRADPRUNE_INLINE To load_bytes(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// The integer type as wide as T, the mask that clears T's sign, and infinity's bit pattern.
template <class T> struct Bits;
template <> struct Bits<float> {
  using Int = std::int32_t;
  static constexpr Int kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
};
template <> struct Bits<double> {
  using Int = std::int64_t;
  static constexpr Int kMagnitude = 0x7fffffffffffffff, kInfinity = 0x7ff0000000000000;
};

template <class T_, int N>
struct Vector {
  using T = T_;
  using Int = typename Bits<T>::Int;
  using Value = typename Native<T, N>::type;
  using Mask = typename Native<Int, N>::type;  // a lane is all ones or all zeros
  static constexpr int kLanes = N;

  Value value;

  // x - 0 equals x and keeps the sign of a zero. A loop over the lanes would not be compiled to one broadcast.
  static GRADPRUNE_INLINE Vector broadcast(T x) { return {x - Value{}}; }
  static GRADPRUNE_INLINE Vector zero() { return {Value{}}; }
  static GRADPRUNE_INLINE Vector load(const T* from) { return {load_bytes<Value>(from)}; }
  GRADPRUNE_INLINE void store(T* to) const { std::memcpy(to, &value, sizeof(value)); }
};

template <class T, int N>
GRADPRUNE_INLINE Vector<T, N> operator+(Vector<T, N> a, Vector<T, N> b) { return {a.value + b.value}; }

template <class T, int N>
GRADPRUNE_INLINE Vector<T, N> operator*(Vector<T, N> a, Vector<T, N> b) { return {a.value * b.value}; }

// a b + c, rounded once if the instruction set has fused multiply-add. Intrinsics, so that this does not depend on how
// the compiler contracts expressions.
template <class T, int N>
GRADPRUNE_INLINE Vector<T, N> multiply_add(Vector<T, N> a, Vector<T, N> b, Vector<T, N> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) * N == 64 && sizeof(T) == 4) return {_mm512_fmadd_ps(a.value, b.value, c.value)};
  if constexpr (sizeof(T) * N == 64 && sizeof(T) == 8) return {_mm512_fmadd_pd(a.value, b.value, c.value)};
#endif
#if defined(__FMA__)
  if constexpr (sizeof(T) * N == 32 && sizeof(T) == 4) return {_mm256_fmadd_ps(a.value, b.value, c.value)};
  if constexpr (sizeof(T) * N == 32 && sizeof(T) == 8) return {_mm256_fmadd_pd(a.value, b.value, c.value)};
#endif
  return {a.value * b.value + c.value};
}

template <class T, int N>
GRADPRUNE_INLINE Vector<T, N> abs(Vector<T, N> a) {
  using V = Vector<T, N>;
  return {bit_cast<typename V::Value>(bit_cast<typename V::Mask>(a.value) & Bits<T>::kMagnitude)};
}

// The larger (smaller) of two non-negative numbers in each lane. They are ordered as their bit patterns are, and an
// integer comparison has no special case for NaN.
template <class T, int N>
GRADPRUNE_INLINE Vector<T, N> larger(Vector<T, N> a, Vector<T, N> b) {
  using V = Vector<T, N>;
  const auto x = bit_cast<typename V::Mask>(a.value), y = bit_cast<typename V::Mask>(b.value);
  return {bit_cast<typename V::Value>(x > y ? x : y)};
}

template <class T, int N>
GRADPRUNE_INLINE Vector<T, N> smaller(Vector<T, N> a, Vector<T, N> b) {
  using V = Vector<T, N>;
  const auto x = bit_cast<typename V::Mask>(a.value), y = bit_cast<typename V::Mask>(b.value);
  return {bit_cast<typename V::Value>(x < y ? x : y)};
}

// A mask of the lanes in which magnitude, which must not be negative, is finite.
template <class T, int N>
GRADPRUNE_INLINE typename Vector<T, N>::Mask is_finite(Vector<T, N> magnitude) {
  return bit_cast<typename Vector<T, N>::Mask>(magnitude.value) < Bits<T>::kInfinity;
}

// Combines all lanes in a tree of fixed order: half with half, then quarter with quarter, ...
template <class T, int N, class Combine>
GRADPRUNE_INLINE T reduce(Vector<T, N> a, Combine combine) {
  if constexpr (N == 1) {
    return a.value[0];
  } else {
    using Half = Vector<T, N / 2>;
    T lanes[N];
    a.store(lanes);
    return reduce(combine(Half::load(lanes), Half::load(lanes + N / 2)), combine);
  }
}

struct Add {
  template <class V> GRADPRUNE_INLINE V operator()(V a, V b) const { return a + b; }
};
struct Larger {
  template <class V> GRADPRUNE_INLINE V operator()(V a, V b) const { return larger(a, b); }
};
struct Smaller {
  template <class V> GRADPRUNE_INLINE V operator()(V a, V b) const { return smaller(a, b); }
};

}  // namespace
}  // namespace gradprune
