// Kernel launches: the device's limits, and the names of kernels.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <set>

#include "cuda_sim.h"
#include "simulator.h"

namespace cuda_sim {

namespace {

constexpr size_t defaultSharedLimit = 48 << 10;
constexpr size_t sharedLimit = 227 << 10;
constexpr size_t sharedPerMultiprocessor = 228 << 10;
constexpr size_t sharedReserved = 1 << 10;
constexpr unsigned registerFile = 65536;
constexpr unsigned assumedRegisters = 32;  // of kernels that the table does not name

std::map<const void*, size_t>& raisedSharedLimits() {
  static std::map<const void*, size_t> instance;
  return instance;
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

// Registers a thread needs, by the kernel's demangled name: nvcc and the host's compiler mangle anonymous namespaces differently.
std::map<std::string, unsigned> readRegisterTable() {
  std::map<std::string, unsigned> table;
  const char* path = std::getenv("CUDA_SIM_REGISTERS");
  if (!path || !*path) return table;
  std::ifstream file(path);
  if (!file) {
    report(cudaErrorInvalidValue, std::string("CUDA_SIM_REGISTERS names a file that cannot be read: ") + path);
    return table;
  }
  std::string name;
  unsigned registers = 0;
  while (file >> name >> registers) table[demangled(name)] = registers;
  return table;
}

unsigned registersOf(const void* kernel) {
  static const std::map<std::string, unsigned> table = readRegisterTable();
  if (table.empty()) return assumedRegisters;
  static std::map<const void*, unsigned> known;
  auto found = known.find(kernel);
  if (found == known.end()) {
    const auto entry = table.find(functionName(kernel));
    found = known.emplace(kernel, entry == table.end() ? assumedRegisters : entry->second).first;
  }
  return found->second;
}

unsigned roundUp(unsigned value, unsigned unit) {
  return (value + unit - 1) / unit * unit;
}

// Registers are given to warps in units of 256, and warps come in fours.
unsigned registersOfBlock(const void* kernel, unsigned threads) {
  return roundUp((threads + 31) / 32, 4) * roundUp(registersOf(kernel) * 32, 256);
}

size_t dynamicSharedLimit(const void* kernel) {
  const auto found = raisedSharedLimits().find(kernel);
  return found == raisedSharedLimits().end() ? defaultSharedLimit : found->second;
}

cudaError_t checkLimits(const Launch& launch) {
  if (!launch.kernel) return cudaErrorInvalidDeviceFunction;
  const dim3 grid = launch.grid;
  const dim3 block = launch.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (launch.sharedBytes > dynamicSharedLimit(launch.kernel)) return cudaErrorInvalidValue;
  if (registersOfBlock(launch.kernel, static_cast<unsigned>(threads)) > registerFile) return cudaErrorLaunchOutOfResources;
  return cudaSuccess;
}

// Whether a kernel on `device` may be given the pointer: null, device memory of that device, or pinned host memory.
bool permitted(const void* pointer, int device) {
  if (!pointer) return true;
  const Found found = findAllocation(pointer);
  return found && (found.allocation->kind != MemoryKind::device || found.allocation->device == device);
}

bool checkPointers(const Launch& launch, const std::string& name, int device) {
  for (size_t i = 0; i < launch.pointers.size(); ++i) {
    if (permitted(launch.pointers[i], device)) continue;
    report(cudaErrorIllegalAddress, name + ": pointer parameter " + std::to_string(i + 1) + " of " +
                                        std::to_string(launch.pointers.size()) + " is not memory of its device");
    return false;
  }
  return true;
}

void checkGuards(const std::vector<const void*>& addresses, const std::string& name) {
  for (const void* address : addresses) {
    const Found found = findAllocation(address);
    if (!found || guardsIntact(found)) continue;
    report(cudaErrorIllegalAddress,
           name + ": wrote beside one of its buffers, of " + std::to_string(found.allocation->bytes) + " bytes");
    return;
  }
}

}  // namespace

std::string functionName(const void* function) {
  Dl_info info;
  if (dladdr(function, &info) != 0 && info.dli_sname && info.dli_saddr == function) return demangled(info.dli_sname);
  return "kernel";
}

void clearFunctionAttributes() {
  raisedSharedLimits().clear();
}

cudaError_t launch(Launch launch) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  if (const cudaError_t error = blocked()) return error;
  CUstream_st* stream = resolveStream(launch.stream);
  if (!stream) return cudaErrorInvalidResourceHandle;
  const int device = deviceOf(stream);
  if (device != currentDevice()) return cudaErrorInvalidResourceHandle;
  if (const cudaError_t error = checkLimits(launch)) return error;
  std::vector<const void*> touches = launch.pointers;
  touches.insert(touches.end(), launch.maybeAddress.begin(), launch.maybeAddress.end());
  const std::string name = functionName(launch.kernel);
  cudaError_t error = cudaSuccess;
  const auto work = [launch = std::move(launch), touches, name, device] {
    if (!checkPointers(launch, name, device)) return;
    runKernel({name, launch.grid, launch.block, launch.sharedBytes, launch.body});
    if (blocked() == cudaSuccess) checkGuards(touches, name);
  };
  push(stream, name, work, touches, error);
  return error;
}

}  // namespace cuda_sim

using namespace cuda_sim;

namespace {
using Lock = std::lock_guard<std::recursive_mutex>;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  if (!function) return remember(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || static_cast<size_t>(value) > sharedLimit) {
    return remember(cudaErrorInvalidValue);
  }
  raisedSharedLimits()[function] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  if (!function) return remember(cudaErrorInvalidDeviceFunction);
  *attributes = cudaFuncAttributes();
  attributes->numRegs = static_cast<int>(registersOf(function));
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(dynamicSharedLimit(function));
  attributes->binaryVersion = 90;
  attributes->ptxVersion = 90;
  attributes->maxThreadsPerBlock = 1024;
  while (registersOfBlock(function, static_cast<unsigned>(attributes->maxThreadsPerBlock)) > registerFile) {
    attributes->maxThreadsPerBlock -= 32;
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int blockSize,
                                                                   size_t dynamicSharedBytes, unsigned int) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  if (!function) return remember(cudaErrorInvalidDeviceFunction);
  if (blockSize < 1) return remember(cudaErrorInvalidValue);
  const auto threads = static_cast<unsigned>(blockSize);
  *blocks = 0;
  if (threads > 1024 || dynamicSharedBytes > dynamicSharedLimit(function)) return cudaSuccess;
  const size_t byShared = sharedPerMultiprocessor / (dynamicSharedBytes + sharedReserved);
  const size_t byThreads = 2048 / roundUp(threads, 32);
  const size_t byRegisters = registerFile / registersOfBlock(function, threads);
  *blocks = static_cast<int>(std::min({byShared, byThreads, byRegisters, size_t{32}}));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int blockSize,
                                                          size_t dynamicSharedBytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, blockSize, dynamicSharedBytes,
                                                                cudaOccupancyDefault);
}
