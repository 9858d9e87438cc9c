// Memory of the CPU device: host memory, aligned for vectors, in huge pages where it is large.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/error.h"
#include "core/memory_info.h"
#include "cpu/cpu_device.h"

namespace lora_da::cpu {

namespace {

constexpr size_t vectorAlignment = 64;
constexpr size_t hugePage = size_t{2} << 20;
constexpr size_t hugePageThreshold = size_t{4} << 20;
constexpr size_t zeroChunk = hugePage;

}  // namespace

Buffer CpuDevice::allocate(size_t bytes, const std::string& purpose) {
  const bool large = bytes >= hugePageThreshold;
  const size_t alignment = large ? hugePage : vectorAlignment;
  const size_t wanted = bytes == 0 ? 1 : bytes;
  const size_t rounded = (wanted + alignment - 1) / alignment * alignment;
  void* memory = rounded < wanted ? nullptr : std::aligned_alloc(alignment, rounded);
  if (!memory) {
    throw Error(code::outOfMemory, "cannot allocate " + std::to_string(bytes) + " bytes of memory for " + purpose);
  }
#ifdef MADV_HUGEPAGE
  if (large) madvise(memory, rounded, MADV_HUGEPAGE);  // advice: without it the memory is slower, not wrong
#endif
  return Buffer(memory, [](void* p) { std::free(p); });
}

DeviceMemory CpuDevice::memory() const {
  return {residentMemory(), availableMemory()};
}

void CpuDevice::upload(void* device, const void* host, size_t bytes) {
  if (bytes > 0) std::memcpy(device, host, bytes);
}

void CpuDevice::download(void* host, const void* device, size_t bytes) {
  if (bytes > 0) std::memcpy(host, device, bytes);
}

void CpuDevice::zero(void* device, size_t bytes) {
  // New pages are cleared by the kernel first, which takes longer than this: each thread gets its own.
  const auto chunks = static_cast<int64_t>((bytes + zeroChunk - 1) / zeroChunk);
#pragma omp parallel for num_threads(threads_) schedule(static) if (chunks > 1)
  for (int64_t i = 0; i < chunks; ++i) {
    const size_t first = static_cast<size_t>(i) * zeroChunk;
    std::memset(static_cast<char*>(device) + first, 0, std::min(zeroChunk, bytes - first));
  }
}

void CpuDevice::copy(void* to, const void* from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

}  // namespace lora_da::cpu
