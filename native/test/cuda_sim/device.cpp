// Devices and their properties, errors, the seed.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simulator.h"

namespace cuda_sim {

namespace {

uint64_t numberFromEnvironment(const char* name, uint64_t otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::strtoull(value, nullptr, 10) : otherwise;
}

Settings settingsFromEnvironment() {
  Settings result;
  result.devices = static_cast<int>(numberFromEnvironment("CUDA_SIM_DEVICES", 1));
  result.memory = numberFromEnvironment("CUDA_SIM_MEMORY", result.memory);
  const char* interleaving = std::getenv("CUDA_SIM_INTERLEAVING");
  if (interleaving && std::strcmp(interleaving, "random") == 0) result.interleaving = Interleaving::random;
  result.driverError = static_cast<cudaError_t>(numberFromEnvironment("CUDA_SIM_DRIVER_ERROR", cudaSuccess));
  return result;
}

struct State {
  Settings settings = settingsFromEnvironment();
  uint64_t seed = numberFromEnvironment("CUDA_SIM_SEED", 1);
  uint64_t randomState = seed;
  cudaError_t sticky = cudaSuccess;
  std::string report;
};

State& state() {
  static auto& instance = *new State;
  return instance;
}

thread_local cudaError_t lastError = cudaSuccess;
thread_local int device = 0;

}  // namespace

std::recursive_mutex& mutex() {
  static auto& instance = *new std::recursive_mutex;
  return instance;
}

cudaError_t blocked() {
  if (state().settings.driverError != cudaSuccess) return state().settings.driverError;
  return state().sticky;
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) lastError = error;
  return error;
}

const Settings& settings() {
  return state().settings;
}
int currentDevice() {
  return device;
}

// splitmix64
uint64_t random() {
  uint64_t z = state().randomState += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

size_t randomBelow(size_t limit) {
  return static_cast<size_t>(random() % limit);
}

void report(cudaError_t error, const std::string& message) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  std::fprintf(stderr, "CUDA simulator (CUDA_SIM_SEED=%llu): %s\n", static_cast<unsigned long long>(state().seed),
               message.c_str());
  if (state().report.empty()) state().report = message;
  if (state().sticky == cudaSuccess) state().sticky = error;
}

std::string lastReport() {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  return state().report;
}

void setSeed(uint64_t value) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  state().seed = value;
  state().randomState = value;
}

uint64_t seed() {
  return state().seed;
}

void resetForTest() {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  state() = State();  // first: the others begin with its settings
  releaseAllStreams();
  releaseAllGraphs();
  releaseAllMemory();
  clearFunctionAttributes();
  lastError = cudaSuccess;
  device = 0;
}

}  // namespace cuda_sim

using namespace cuda_sim;

namespace {

using Lock = std::lock_guard<std::recursive_mutex>;

constexpr int multiprocessors = 132;
constexpr size_t sharedPerBlock = 48 << 10;
constexpr size_t sharedOptIn = 227 << 10;
constexpr size_t sharedPerMultiprocessor = 228 << 10;
constexpr size_t sharedReserved = 1 << 10;
constexpr int version = 13000;

}  // namespace

cudaError_t cudaGetDeviceCount(int* count) {
  const Lock lock(mutex());
  *count = 0;
  if (const cudaError_t error = blocked()) return remember(error);
  *count = settings().devices;
  return remember(settings().devices > 0 ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int* result) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  *result = device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int index) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  if (index < 0 || index >= settings().devices) return remember(cudaErrorInvalidDevice);
  device = index;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  if (index < 0 || index >= settings().devices) return remember(cudaErrorInvalidDevice);
  *properties = cudaDeviceProp();
  std::snprintf(properties->name, sizeof properties->name, "CUDA simulator");
  properties->uuid.bytes[0] = static_cast<char>(index + 1);
  properties->totalGlobalMem = settings().memory;
  properties->sharedMemPerBlock = sharedPerBlock;
  properties->sharedMemPerBlockOptin = sharedOptIn;
  properties->sharedMemPerMultiprocessor = sharedPerMultiprocessor;
  properties->reservedSharedMemPerBlock = sharedReserved;
  properties->regsPerBlock = 65536;
  properties->regsPerMultiprocessor = 65536;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsDim[0] = 1024;
  properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = 65535;
  properties->maxGridSize[2] = 65535;
  properties->major = 9;
  properties->minor = 0;
  properties->multiProcessorCount = multiprocessors;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->l2CacheSize = 50 << 20;
  properties->memoryBusWidth = 5120;
  properties->unifiedAddressing = 1;
  properties->canMapHostMemory = 1;
  properties->concurrentKernels = 1;
  properties->asyncEngineCount = 3;
  properties->pciBusID = index + 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  cudaDeviceProp p;
  if (const cudaError_t error = cudaGetDeviceProperties(&p, index)) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; return cudaSuccess;
    case cudaDevAttrMaxBlockDimX: *value = p.maxThreadsDim[0]; return cudaSuccess;
    case cudaDevAttrMaxBlockDimY: *value = p.maxThreadsDim[1]; return cudaSuccess;
    case cudaDevAttrMaxBlockDimZ: *value = p.maxThreadsDim[2]; return cudaSuccess;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; return cudaSuccess;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; return cudaSuccess;
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[2]; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = static_cast<int>(p.sharedMemPerBlock); return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(p.sharedMemPerBlockOptin); return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = static_cast<int>(p.sharedMemPerMultiprocessor); return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = static_cast<int>(p.reservedSharedMemPerBlock); return cudaSuccess;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; return cudaSuccess;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerMultiprocessor; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = p.warpSize; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; return cudaSuccess;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; return cudaSuccess;
    case cudaDevAttrClockRate: *value = 1980000; return cudaSuccess;
    case cudaDevAttrMemoryClockRate: *value = 2619000; return cudaSuccess;
    case cudaDevAttrUnifiedAddressing: *value = p.unifiedAddressing; return cudaSuccess;
    case cudaDevAttrConcurrentKernels: *value = p.concurrentKernels; return cudaSuccess;
    case cudaDevAttrAsyncEngineCount: *value = p.asyncEngineCount; return cudaSuccess;
    case cudaDevAttrPciBusId: *value = p.pciBusID; return cudaSuccess;
    case cudaDevAttrIntegrated:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported: *value = 0; return cudaSuccess;
    default: return remember(cudaErrorInvalidValue);
  }
}

cudaError_t cudaDriverGetVersion(int* result) {
  *result = version;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* result) {
  *result = version;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return error;
  const cudaError_t error = lastError;
  lastError = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return error;
  return lastError;
}

namespace {

struct ErrorText {
  cudaError_t error;
  const char* name;
  const char* text;
};

constexpr ErrorText errorTexts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidPitchValue, "cudaErrorInvalidPitchValue", "invalid pitch argument"},
    {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched", "capture was not initiated in this stream"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent", "operation not permitted on an event last recorded in a capturing stream"},
};

const ErrorText* findErrorText(cudaError_t error) {
  for (const ErrorText& each : errorTexts) {
    if (each.error == error) return &each;
  }
  return nullptr;
}

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
  const ErrorText* found = findErrorText(error);
  return found ? found->name : "cudaErrorUnknown";
}

const char* cudaGetErrorString(cudaError_t error) {
  const ErrorText* found = findErrorText(error);
  return found ? found->text : "unknown error";
}
