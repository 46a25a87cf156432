// Scratch memory, aligned to cache lines.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace metafast {

// Uninitialised memory in which vectors do not straddle lines of the cache, as half of them would in what plain new returns.
constexpr std::align_val_t cache_line{64};

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, cache_line); }
};

template <typename T>
using Memory = std::unique_ptr<T[], FreeAligned>;

template <typename T>
Memory<T> aligned_memory(int64_t size) {
  return Memory<T>(static_cast<T*>(::operator new(size_t(size) * sizeof(T), cache_line)));
}

}  // namespace metafast
