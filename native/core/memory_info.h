// What the system has left.
#pragma once

#include <cstddef>

namespace lora_da {

// Bytes that can be allocated without swapping (MemAvailable, or what the cgroup's limit leaves), or 0 where unknown.
size_t availableMemory();
// Bytes of this process in memory, pages of mapped files included, or 0 where unknown.
size_t residentMemory();

}  // namespace lora_da
