// Device and pinned memory, and copies. Every allocation is a heap block of its own, filled with 0xFF bytes (NaN).
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "simulator.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_sim {

namespace {

constexpr size_t alignment = 256;  // what cudaMalloc promises

// AddressSanitizer sees every access beside a block of exact size; elsewhere a guard on both sides shows writes.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t guardBytes = 0;
void close(const unsigned char* start, size_t bytes) {
  __asan_poison_memory_region(start, bytes);
}
void open(const unsigned char* start, size_t bytes) {
  __asan_unpoison_memory_region(start, bytes);
}
#else
constexpr size_t guardBytes = 256;
void close(const unsigned char*, size_t) {}
void open(const unsigned char*, size_t) {}
#endif
constexpr unsigned char guardByte = 0xFD;

using Allocations = std::map<const unsigned char*, Allocation>;

Allocations& allocations() {
  static auto& instance = *new Allocations;
  return instance;
}

bool allGuard(const unsigned char* first) {
  return std::all_of(first, first + guardBytes, [](unsigned char byte) { return byte == guardByte; });
}

size_t allocatedOn(int device) {
  size_t sum = 0;
  for (const auto& [start, allocation] : allocations()) {
    if (allocation.kind == MemoryKind::device && allocation.device == device) sum += allocation.bytes;
  }
  return sum;
}

cudaError_t allocate(void** pointer, size_t bytes, MemoryKind kind) {
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  const int device = currentDevice();
  if (kind == MemoryKind::device) {
    const size_t used = allocatedOn(device);
    if (used > settings().memory || bytes > settings().memory - used) return remember(cudaErrorMemoryAllocation);
  }
  void* block = nullptr;
  if (bytes > SIZE_MAX / 2 || posix_memalign(&block, alignment, bytes + 2 * guardBytes) != 0) {
    return remember(cudaErrorMemoryAllocation);
  }
  auto* start = static_cast<unsigned char*>(block) + guardBytes;
  std::memset(block, guardByte, guardBytes);
  std::memset(start, 0xFF, bytes);
  std::memset(start + bytes, guardByte, guardBytes);
  Allocation allocation;
  allocation.kind = kind;
  allocation.bytes = bytes;
  allocation.device = device;
  allocation.block = block;
  allocations().emplace(start, allocation);
  if (kind == MemoryKind::device) close(start, bytes);
  *pointer = start;
  return cudaSuccess;
}

const char* kindName(MemoryKind kind) {
  return kind == MemoryKind::device ? "device memory" : "pinned host memory";
}

cudaError_t release(void* pointer, MemoryKind kind) {
  if (!pointer) return cudaSuccess;
  const auto found = allocations().find(static_cast<const unsigned char*>(pointer));
  if (found == allocations().end() || found->second.kind != kind) return remember(cudaErrorInvalidValue);
  if (const Operation* user = queuedUser(pointer)) {
    report(cudaErrorIllegalAddress, std::string(kindName(kind)) + " (" + std::to_string(found->second.bytes) +
                                        " bytes) is freed while queued work still uses it: " + user->name);
  }
  if (!guardsIntact({found->first, &found->second})) {
    report(cudaErrorIllegalAddress,
           std::string("something wrote beside ") + kindName(kind) + " of " + std::to_string(found->second.bytes) + " bytes");
  }
  open(found->first, found->second.bytes);
  std::free(found->second.block);
  allocations().erase(found);
  return blocked();
}

// The piece of memory that holds all of the bytes.
Found findWhole(const void* pointer, size_t bytes) {
  const Found found = findAllocation(pointer);
  if (!found) return {};
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(pointer) - found.start);
  return bytes <= found.allocation->bytes - offset ? found : Found{};
}

}  // namespace

Found findAllocation(const void* address) {
  const auto* wanted = static_cast<const unsigned char*>(address);
  auto next = allocations().upper_bound(wanted);
  if (next == allocations().begin()) return {};
  --next;
  if (wanted > next->first + next->second.bytes) return {};
  return {next->first, &next->second};
}

bool readableByKernels(const void* address, size_t bytes) {
  return static_cast<bool>(findWhole(address, bytes));
}

void openDeviceMemory() {
  for (const auto& [start, allocation] : allocations()) {
    if (allocation.kind == MemoryKind::device) open(start, allocation.bytes);
  }
}

void closeDeviceMemory() {
  for (const auto& [start, allocation] : allocations()) {
    if (allocation.kind == MemoryKind::device) close(start, allocation.bytes);
  }
}

bool guardsIntact(const Found& found) {
  if (found.allocation->kind == MemoryKind::registered) return true;
  return allGuard(found.start - guardBytes) && allGuard(found.start + found.allocation->bytes);
}

bool isDevice(const void* pointer, size_t bytes) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  const Found found = findWhole(pointer, bytes);
  return found && found.allocation->kind == MemoryKind::device;
}

bool isPinned(const void* pointer, size_t bytes) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  const Found found = findWhole(pointer, bytes);
  return found && found.allocation->kind != MemoryKind::device;
}

size_t allocatedBytes() {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  size_t sum = 0;
  for (int device = 0; device < settings().devices; ++device) sum += allocatedOn(device);
  return sum;
}

void releaseAllMemory() {
  for (const auto& [start, allocation] : allocations()) {
    if (allocation.kind == MemoryKind::registered) continue;
    open(start, allocation.bytes);
    std::free(allocation.block);
  }
  allocations().clear();
}

}  // namespace cuda_sim

using namespace cuda_sim;

namespace {

using Lock = std::lock_guard<std::recursive_mutex>;

struct Copy {
  void* target;
  size_t targetPitch;
  const void* source;
  size_t sourcePitch;
  size_t width;
  size_t height;
};

size_t span(size_t pitch, const Copy& copy) {
  return (copy.height - 1) * pitch + copy.width;
}

void copyRows(const Copy& copy) {
  for (size_t row = 0; row < copy.height; ++row) {
    std::memcpy(static_cast<unsigned char*>(copy.target) + row * copy.targetPitch,
                static_cast<const unsigned char*>(copy.source) + row * copy.sourcePitch, copy.width);
  }
}

enum class Side { device, pinned, pageable, invalid };

Side sideOf(const void* pointer, size_t bytes) {
  const Found found = findAllocation(pointer);
  if (!found || static_cast<const unsigned char*>(pointer) == found.start + found.allocation->bytes) {
    return pointer ? Side::pageable : Side::invalid;
  }
  if (!isDevice(pointer, bytes) && !isPinned(pointer, bytes)) return Side::invalid;  // begins inside, ends outside
  return found.allocation->kind == MemoryKind::device ? Side::device : Side::pinned;
}

bool matches(cudaMemcpyKind kind, Side target, Side source) {
  const bool toDevice = target == Side::device;
  const bool fromDevice = source == Side::device;
  switch (kind) {
    case cudaMemcpyHostToHost: return !toDevice && !fromDevice;
    case cudaMemcpyHostToDevice: return toDevice && !fromDevice;
    case cudaMemcpyDeviceToHost: return !toDevice && fromDevice;
    case cudaMemcpyDeviceToDevice: return toDevice && fromDevice;
    case cudaMemcpyDefault: return true;
  }
  return false;
}

const char* copyName(Side target, Side source) {
  if (target == Side::device) return source == Side::device ? "copy on the device" : "copy to the device";
  return source == Side::device ? "copy from the device" : "copy on the host";
}

// Pageable memory is read before the call returns, and written before it returns; pinned memory when the copy runs.
cudaError_t enqueueCopy(const Copy& given, cudaMemcpyKind kind, cudaStream_t handle, bool wait) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  CUstream_st* stream = resolveStream(handle);
  if (!stream) return remember(cudaErrorInvalidResourceHandle);
  if (given.width == 0 || given.height == 0) return cudaSuccess;
  if (given.targetPitch < given.width || given.sourcePitch < given.width) return remember(cudaErrorInvalidPitchValue);
  Copy copy = given;
  const Side target = sideOf(copy.target, span(copy.targetPitch, copy));
  const Side source = sideOf(copy.source, span(copy.sourcePitch, copy));
  if (target == Side::invalid || source == Side::invalid) return remember(cudaErrorInvalidValue);
  if (!matches(kind, target, source)) return remember(cudaErrorInvalidValue);
  const bool pageable = target == Side::pageable || source == Side::pageable;
  if (isCapturing(stream) && pageable) return remember(invalidateCapture(stream, cudaErrorStreamCaptureUnsupported));

  std::shared_ptr<std::vector<unsigned char>> staged;
  if (source == Side::pageable) {
    staged = std::make_shared<std::vector<unsigned char>>(copy.width * copy.height);
    copyRows({staged->data(), copy.width, copy.source, copy.sourcePitch, copy.width, copy.height});
    copy.source = staged->data();
    copy.sourcePitch = copy.width;
  }
  cudaError_t error = cudaSuccess;
  const auto operation = push(
      stream, copyName(target, source), [copy, staged] { copyRows(copy); }, {given.target, given.source}, error);
  if (error != cudaSuccess) return remember(error);
  if (operation && (wait || target == Side::pageable)) finish(operation);
  return remember(blocked());
}

cudaError_t enqueueFill(void* target, int value, size_t bytes, cudaStream_t handle) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  CUstream_st* stream = resolveStream(handle);
  if (!stream) return remember(cudaErrorInvalidResourceHandle);
  if (bytes == 0) return cudaSuccess;
  if (!isDevice(target, bytes) && !isPinned(target, bytes)) return remember(cudaErrorInvalidValue);
  cudaError_t error = cudaSuccess;
  push(
      stream, "fill", [target, value, bytes] { std::memset(target, value, bytes); }, {target}, error);
  return remember(error);
}

cudaError_t allocateIn(void** pointer, size_t bytes, MemoryKind kind) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  if (const cudaError_t error = refuseInCapture()) return remember(error);
  return allocate(pointer, bytes, kind);
}

cudaError_t releaseFrom(void* pointer, MemoryKind kind) {
  const Lock lock(mutex());
  if (const cudaError_t error = refuseInCapture()) return remember(error);
  return release(pointer, kind);
}

}  // namespace

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return allocateIn(pointer, bytes, MemoryKind::device);
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  return allocateIn(pointer, bytes, MemoryKind::pinned);
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned int) {
  return allocateIn(pointer, bytes, MemoryKind::pinned);
}
cudaError_t cudaFree(void* pointer) {
  return releaseFrom(pointer, MemoryKind::device);
}
cudaError_t cudaFreeHost(void* pointer) {
  return releaseFrom(pointer, MemoryKind::pinned);
}

cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned int) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  if (!pointer || bytes == 0) return remember(cudaErrorInvalidValue);
  const auto* start = static_cast<const unsigned char*>(pointer);
  for (const auto& [other, allocation] : allocations()) {
    if (other < start + bytes && start < other + allocation.bytes) return remember(cudaErrorHostMemoryAlreadyRegistered);
  }
  Allocation allocation;
  allocation.kind = MemoryKind::registered;
  allocation.bytes = bytes;
  allocation.device = currentDevice();
  allocations().emplace(start, allocation);
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* pointer) {
  const Lock lock(mutex());
  const auto found = allocations().find(static_cast<const unsigned char*>(pointer));
  if (found == allocations().end() || found->second.kind != MemoryKind::registered) {
    return remember(cudaErrorHostMemoryNotRegistered);
  }
  if (const Operation* user = queuedUser(pointer)) {
    report(cudaErrorIllegalAddress, "registered host memory is given back while queued work still uses it: " + user->name);
  }
  allocations().erase(found);
  return blocked();
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  *total = settings().memory;
  *free = settings().memory - std::min(settings().memory, allocatedOn(currentDevice()));
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  *attributes = cudaPointerAttributes();
  attributes->type = cudaMemoryTypeUnregistered;
  attributes->device = -1;
  if (const Found found = findWhole(pointer, 1)) {
    const bool device = found.allocation->kind == MemoryKind::device;
    attributes->type = device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    attributes->device = found.allocation->device;
    attributes->devicePointer = const_cast<void*>(pointer);
    attributes->hostPointer = device ? nullptr : const_cast<void*>(pointer);
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return enqueueCopy({target, bytes, source, bytes, bytes, 1}, kind, stream, false);
}

cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind) {
  if (const cudaError_t error = refuseInCapture()) return remember(error);
  return enqueueCopy({target, bytes, source, bytes, bytes, 1}, kind, cudaStreamLegacy, kind != cudaMemcpyDeviceToDevice);
}

cudaError_t cudaMemcpy2DAsync(void* target, size_t targetPitch, const void* source, size_t sourcePitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  return enqueueCopy({target, targetPitch, source, sourcePitch, width, height}, kind, stream, false);
}

cudaError_t cudaMemcpy2D(void* target, size_t targetPitch, const void* source, size_t sourcePitch, size_t width, size_t height,
                         cudaMemcpyKind kind) {
  if (const cudaError_t error = refuseInCapture()) return remember(error);
  return enqueueCopy({target, targetPitch, source, sourcePitch, width, height}, kind, cudaStreamLegacy,
                     kind != cudaMemcpyDeviceToDevice);
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream) {
  return enqueueFill(target, value, bytes, stream);
}

cudaError_t cudaMemset(void* target, int value, size_t bytes) {
  if (const cudaError_t error = refuseInCapture()) return remember(error);
  return enqueueFill(target, value, bytes, cudaStreamLegacy);
}
