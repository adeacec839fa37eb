// Element types of tensors, as the codes that Python passes and as C++ types, and matrices of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gradprune {

enum class ElementType : int { Float32 = 0, BFloat16 = 1, Float16 = 2, Float64 = 3 };
constexpr int kElementTypes = 4;

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

inline std::size_t element_size(ElementType type) {
  constexpr std::size_t sizes[kElementTypes] = {4, 2, 2, 8};
  return sizes[static_cast<int>(type)];
}

inline const char* offset(const void* base, ElementType type, std::ptrdiff_t elements) {
  return static_cast<const char*>(base) + elements * static_cast<std::ptrdiff_t>(element_size(type));
}

// A matrix with unit stride along its rows.
struct Matrix {
  const void* data;
  std::ptrdiff_t stride;  // between rows, in elements
  ElementType type;

  // The part of the matrix that begins at this row and column.
  Matrix from(std::ptrdiff_t row, std::ptrdiff_t column) const {
    return {offset(data, type, row * stride + column), stride, type};
  }
};

}  // namespace gradprune
