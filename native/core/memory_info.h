// What the system has left.
#pragma once

#include <cstddef>

namespace lora_da {

// Bytes that can be allocated without swapping (MemAvailable, or what the cgroup's limit leaves), or 0 where unknown.
size_t availableMemory();

}  // namespace lora_da
