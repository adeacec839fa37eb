// Memory that outlives an op.
#pragma once

#include <cstddef>
#include <memory>

namespace gradprune {

// Uninitialised memory for `User`, aligned for any number; valid until the calling thread's next call for that user.
// The thread keeps it: pages that are new to a process have to be cleared first, and in a virtual machine perhaps fetched
// from its host, which can take longer than the op that they are for.
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
