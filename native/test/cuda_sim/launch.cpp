// Kernel launches: the device's limits, and the names of kernels.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "cuda_sim.h"
#include "simulator.h"
#include "symbols.h"

namespace cuda_sim {

namespace {

constexpr size_t defaultSharedLimit = 48 << 10;
constexpr size_t sharedLimit = 227 << 10;
constexpr size_t sharedPerMultiprocessor = 228 << 10;
constexpr size_t sharedReserved = 1 << 10;
constexpr unsigned registerFile = 65536;
constexpr unsigned registerUnit = 256;
constexpr unsigned assumedRegisters = 32;  // of kernels that the table does not name

std::map<const void*, size_t>& raisedSharedLimits() {
  static auto& instance = *new std::map<const void*, size_t>;
  return instance;
}

// Registers a thread needs, by the kernel's demangled name: nvcc and the host's compiler mangle anonymous namespaces differently.
// The file has lines of a mangled name and a number, or is what nvcc prints with -Xptxas -v; the largest number of a name counts.
std::map<std::string, unsigned> readRegisterTable() {
  std::map<std::string, unsigned> table;
  const char* path = std::getenv("CUDA_SIM_REGISTERS");
  if (!path || !*path) return table;
  std::ifstream file(path);
  if (!file) {
    report(cudaErrorInvalidValue, std::string("CUDA_SIM_REGISTERS names a file that cannot be read: ") + path);
    return table;
  }
  std::string line;
  std::string kernel;
  char name[4096];
  unsigned registers = 0;
  while (std::getline(file, line)) {
    if (std::sscanf(line.c_str(), "ptxas info : Compiling entry function '%4095[^']'", name) == 1) {
      kernel = name;
      continue;
    }
    if (std::sscanf(line.c_str(), "ptxas info : Used %u registers", &registers) != 1) {
      if (std::sscanf(line.c_str(), "%4095s %u", name, &registers) != 2) continue;
      kernel = name;
    }
    unsigned& known = table[demangled(kernel)];
    known = std::max(known, registers);
  }
  return table;
}

// What is known of a kernel, found at its first launch.
struct KernelFacts {
  std::string name;
  unsigned registers = assumedRegisters;
};

std::map<const void*, KernelFacts>& kernels() {
  static auto& instance = *new std::map<const void*, KernelFacts>;
  return instance;
}

const KernelFacts& factsOf(const void* kernel) {
  const auto found = kernels().find(kernel);
  if (found != kernels().end()) return found->second;
  // Read anew for the first kernel after a reset.
  static auto& table = *new std::map<std::string, unsigned>;
  if (kernels().empty()) table = readRegisterTable();
  KernelFacts facts;
  facts.name = functionName(kernel);
  const auto entry = table.find(facts.name);
  if (entry != table.end()) facts.registers = entry->second;
  return kernels().emplace(kernel, std::move(facts)).first->second;
}

unsigned roundUp(unsigned value, unsigned unit) {
  return (value + unit - 1) / unit * unit;
}

unsigned registersOfWarp(const void* kernel) {
  return roundUp(factsOf(kernel).registers * 32, registerUnit);
}

// Each of a multiprocessor's four parts holds a quarter of a block's warps, rounded up.
unsigned registersOfBlock(const void* kernel, unsigned threads) {
  return roundUp((threads + 31) / 32, 4) * registersOfWarp(kernel);
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

void clearFunctionAttributes() {
  raisedSharedLimits().clear();
  kernels().clear();
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
  const std::string name = factsOf(launch.kernel).name;
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
  attributes->numRegs = static_cast<int>(factsOf(function).registers);
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
  const size_t byRegisters = registerFile / 4 / registersOfWarp(function) * 4 / (roundUp(threads, 32) / 32);
  *blocks = static_cast<int>(std::min({byShared, byThreads, byRegisters, size_t{32}}));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int blockSize,
                                                          size_t dynamicSharedBytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, blockSize, dynamicSharedBytes,
                                                                cudaOccupancyDefault);
}
