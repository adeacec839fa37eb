// Scratch memory that is kept from one call of an op to the next.
#pragma once

#include <cstddef>
#include <memory>

namespace gradprune {

// Returns a thread-local buffer, one per type `User`, uninitialised and maximally aligned. The thread's next call with
// the same `User` invalidates it. Buffers are kept because faulting in fresh pages can cost more than the op.
template <class User>
std::byte* scratch(std::size_t bytes) {
  thread_local std::unique_ptr<std::byte[]> memory;
  thread_local std::size_t size = 0;
  if (bytes > size) {
    size = 0;
    memory.reset();
    memory.reset(new std::byte[bytes]);
    size = bytes;
  }
  return memory.get();
}

}  // namespace gradprune
