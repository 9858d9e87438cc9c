// The simulator as host code sees it beyond the CUDA runtime's own functions: libraries' stand-ins put their work on a stream
// with enqueue and check their operands with isDevice; tests ask what was reported.
#pragma once

#include <driver_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace cuda_sim {

// Puts work on a stream, or into the graph that the stream is capturing; it may run more than once, as often as its graph is
// launched. `touches` are addresses in the memory that the work reads or writes: freeing one before the work ran is reported.
cudaError_t enqueue(cudaStream_t stream, const char* name, std::function<void()> work, std::vector<const void*> touches = {});

// Whether [pointer, pointer + bytes) lies within one piece of device memory.
bool isDevice(const void* pointer, size_t bytes);
// The same for pinned host memory.
bool isPinned(const void* pointer, size_t bytes);

// Reports misuse: printed with the seed, kept for lastReport, and `error` returned by every later call, as after a device fault.
// Within an enqueued work it does not end that work: return after it.
void report(cudaError_t error, const std::string& message);
// The first report since the start or resetForTest; empty when there was none.
std::string lastReport();
// Forgets reports, errors and queued work, and frees what is left of device and pinned memory, streams and events. The seed is
// taken from CUDA_SIM_SEED again.
void resetForTest();

// Which queued work a synchronization runs. lazy: only what it must, so that a result which nobody waits for is never there;
// random: streams interleave until what was waited for is done, so that work may also come earlier than hoped.
enum class Interleaving { lazy, random };
// CUDA_SIM_INTERLEAVING=random chooses the second at the start.
void setInterleaving(Interleaving interleaving);
// What the order of threads, blocks and streams follows from; CUDA_SIM_SEED at the start.
void setSeed(uint64_t seed);
uint64_t seed();

// Bytes of device memory (of all devices) allocated now, and operations queued and not yet run.
size_t allocatedBytes();
size_t queuedOperations();

}  // namespace cuda_sim
