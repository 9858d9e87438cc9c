// Lines of the caches: scratch memory that several arrays or threads share is cut at them, and memory is asked for by them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lora_da::cpu {

constexpr size_t cacheLineBytes = 64;

constexpr size_t cacheLines(size_t bytes) {
  return (bytes + cacheLineBytes - 1) / cacheLineBytes * cacheLineBytes;
}

// Asks the second-level cache for memory that is read soon.
inline void askFor(const void* from, int64_t bytes) {
  constexpr auto step = static_cast<int64_t>(cacheLineBytes);
  for (int64_t at = 0; at < bytes; at += step) __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
}

}  // namespace lora_da::cpu
