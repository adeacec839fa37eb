// Chunks of gradients, and the elements of a chunk that each thread of its block works on. All of it also compiles for
// the host, for tests.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/element_type.h"
#include "gradient_statistics.h"

namespace gradprune {

// Threads of a block; every chunk has a block of its own. The order of summation depends on this number: changing it
// changes the bits of results.
constexpr int kBlockThreads = 256;

constexpr int kVectorBytes = 16;  // the widest load a thread can issue

// A row of the caller's table: `count` consecutive elements of gradient `index`, of ElementType `type`, aligned to the
// size of an element.
struct Chunk {
  std::int64_t address, count, type, index;
};
static_assert(sizeof(Chunk) == 4 * sizeof(std::int64_t), "a row of the [chunks, 4] int64 table");

GRADPRUNE_HOST_DEVICE float widen(float x) { return x; }
GRADPRUNE_HOST_DEVICE double widen(double x) { return x; }
GRADPRUNE_HOST_DEVICE float widen(__half x) { return __half2float(x); }
GRADPRUNE_HOST_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Round to nearest even.
GRADPRUNE_HOST_DEVICE void narrow(float x, float& to) { to = x; }
GRADPRUNE_HOST_DEVICE void narrow(double x, double& to) { to = x; }
GRADPRUNE_HOST_DEVICE void narrow(float x, __half& to) { to = __float2half_rn(x); }
GRADPRUNE_HOST_DEVICE void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

template <class E>
constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(E));

template <class E>
GRADPRUNE_HOST_DEVICE bool is_aligned(const E* at) { return reinterpret_cast<std::uintptr_t>(at) % kVectorBytes == 0; }

// The elements of [at, at + count) before the first multiple of kVectorBytes.
template <class E>
GRADPRUNE_HOST_DEVICE std::int64_t elements_before_boundary(const E* at, std::int64_t count) {
  const std::uintptr_t past = reinterpret_cast<std::uintptr_t>(at) % kVectorBytes;
  const std::int64_t elements = static_cast<std::int64_t>((kVectorBytes - past) % kVectorBytes / sizeof(E));
  return elements < count ? elements : count;
}

// N elements that a thread works on at a time. They are loaded and stored by one access if they fill an aligned vector.
template <class E, int N>
struct Lanes {
  E lane[N];

  template <bool ALIGNED>
  static GRADPRUNE_HOST_DEVICE Lanes load(const E* from) {
    Lanes lanes;
    if constexpr (ALIGNED && N == kVectorElements<E>) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from);
      memcpy(static_cast<void*>(lanes.lane), &bits, kVectorBytes);  // as bytes: the half types are classes
    } else {
      for (int k = 0; k < N; ++k) lanes.lane[k] = from[k];
    }
    return lanes;
  }

  template <bool ALIGNED>
  GRADPRUNE_HOST_DEVICE void store(E* to) const {
    if constexpr (ALIGNED && N == kVectorElements<E>) {
      uint4 bits;
      memcpy(&bits, lane, kVectorBytes);
      *reinterpret_cast<uint4*>(to) = bits;
    } else {
      for (int k = 0; k < N; ++k) to[k] = lane[k];
    }
  }
};

// Calls visit(lanes, address of the first lane) for the elements of [first, first + count) that belong to `thread`:
// whole vectors first, every kBlockThreads-th of them, then at most one element of the tail. Neither the elements of a
// thread nor their order depend on alignment, so results do not either.
template <bool ALIGNED, class E, class Visit>
GRADPRUNE_HOST_DEVICE void for_each_of_thread(E* first, std::int64_t count, int thread, Visit&& visit) {
  using Element = std::remove_const_t<E>;
  constexpr int kWidth = kVectorElements<Element>;
  constexpr int kBatch = 4;  // loads in flight
  constexpr std::int64_t kStep = static_cast<std::int64_t>(kBlockThreads) * kWidth;
  const std::int64_t whole = count / kWidth * kWidth;
  std::int64_t i = static_cast<std::int64_t>(thread) * kWidth;
  for (; i + (kBatch - 1) * kStep < whole; i += kBatch * kStep) {
    Lanes<Element, kWidth> batch[kBatch];
    for (int k = 0; k < kBatch; ++k) batch[k] = Lanes<Element, kWidth>::template load<ALIGNED>(first + i + k * kStep);
    for (int k = 0; k < kBatch; ++k) visit(batch[k], first + i + k * kStep);
  }
  for (; i < whole; i += kStep) visit(Lanes<Element, kWidth>::template load<ALIGNED>(first + i), first + i);
  if (whole + thread < count) {
    E* last = first + whole + thread;
    visit(Lanes<Element, 1>::template load<ALIGNED>(last), last);
  }
}

// Calls f with a typed pointer to the chunk's first element.
template <class F>
GRADPRUNE_HOST_DEVICE void with_elements(const Chunk& chunk, F&& f) {
  void* address = reinterpret_cast<void*>(chunk.address);
  switch (static_cast<ElementType>(chunk.type)) {
    case ElementType::Float32: return f(static_cast<float*>(address));
    case ElementType::BFloat16: return f(static_cast<__nv_bfloat16*>(address));
    case ElementType::Float16: return f(static_cast<__half*>(address));
    case ElementType::Float64: return f(static_cast<double*>(address));
  }
}

}  // namespace gradprune
