// What the simulator's parts know of each other.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_sim_api.h"

namespace cuda_sim {

// device.cpp: errors, the seed, settings

// Held during every call of the API, and while queued work runs.
std::recursive_mutex& mutex();

// The error that a call must return before it does anything: a sticky one, or none.
cudaError_t blocked();
// Remembers an error for cudaGetLastError.
cudaError_t remember(cudaError_t error);
void clearErrors();

uint64_t random();
// A number below `limit`.
size_t randomBelow(size_t limit);

struct Settings {
  int devices = 1;
  size_t memory = size_t{8} << 30;  // of one device
  cudaError_t driverError = cudaSuccess;
  Interleaving interleaving = Interleaving::lazy;
};
const Settings& settings();
int currentDevice();

// memory.cpp

enum class MemoryKind { device, pinned, registered };

struct Allocation {
  MemoryKind kind;
  size_t bytes = 0;
  int device = 0;
  void* block = nullptr;  // what the allocator gave, with guards where they are used
};

struct Found {
  const unsigned char* start = nullptr;
  const Allocation* allocation = nullptr;
  explicit operator bool() const { return allocation != nullptr; }
};
// The allocation that the address lies in, or ends.
Found findAllocation(const void* address);
// Whether a thread may read all of the bytes: they lie within one piece of device or pinned memory.
bool readableByKernels(const void* address, size_t bytes);
// While the host's code runs, AddressSanitizer takes every access to device memory for a mistake.
void openDeviceMemory();
void closeDeviceMemory();
// Whether the bytes beside the allocation are as they were; always true under AddressSanitizer, which watches them itself.
bool guardsIntact(const Found& found);
void releaseAllMemory();

// streams.cpp

struct Operation {
  std::string name;
  std::function<void()> work;
  std::vector<const void*> touches;  // starts of allocations
  std::vector<std::shared_ptr<Operation>> waits;
  CUstream_st* stream = nullptr;
  uint64_t sequence = 0;  // within the stream, from 1
  bool done = false;
  double milliseconds = 0;  // host time when it was done
};
using OperationPointer = std::shared_ptr<Operation>;

struct Capture;

// Adds an operation to the stream's queue or to the graph it captures. Null, with `error` set, when it cannot.
OperationPointer push(CUstream_st* stream, std::string name, std::function<void()> work, std::vector<const void*> touches,
                      cudaError_t& error);
// The stream that a handle means; null when there is none.
CUstream_st* resolveStream(cudaStream_t handle);
bool isCapturing(const CUstream_st* stream);
int deviceOf(const CUstream_st* stream);
// Runs what must run before `operation` is done, and it.
void finish(const OperationPointer& operation);
// The queued operation that uses the allocation starting there, if any.
const Operation* queuedUser(const void* start);
void releaseAllStreams();

// graphs.cpp

struct Node {
  std::string name;
  std::function<void()> work;
  std::vector<const void*> touches;
  std::vector<size_t> waits;
};
// Marks the capture of the stream as failed.
cudaError_t invalidateCapture(CUstream_st* stream, cudaError_t error);
// A call that may not happen while any stream captures: fails such captures and returns the error to return, or success.
cudaError_t refuseInCapture();
cudaError_t addNode(CUstream_st* stream, Node node);
void releaseAllGraphs();

// launch.cpp

void clearFunctionAttributes();

// simt.cpp

struct KernelRun {
  const std::string& name;
  dim3 grid;
  dim3 block;
  size_t sharedBytes;
  const std::function<void()>& body;
};
// Runs all blocks. Returns early, after a report, when a thread did what it must not.
void runKernel(const KernelRun& run);

// Reports and ends the kernel; to be called by one of its threads.
[[noreturn]] void failThread(cudaError_t error, const std::string& message);
// The name and the place of the thread that runs, for messages.
std::string currentThreadName();
bool inSharedMemory(const void* address, size_t bytes);

// tensor_core.cpp

// Whether a thread has asynchronous copies that it has not waited for.
bool copiesUnderWay(unsigned thread);
// Forgets a thread's copies and their groups.
void dropCopies(unsigned thread);
unsigned currentThread();

}  // namespace cuda_sim
