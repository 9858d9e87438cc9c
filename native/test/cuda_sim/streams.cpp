// Streams and events. Work is only queued; it runs when the host waits for it, in an order that the dependencies allow.
#include "streams.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <set>

#include "simulator.h"

namespace cuda_sim {

namespace {

struct Streams {
  std::map<int, std::unique_ptr<CUstream_st>> legacy;  // by device
  std::vector<std::unique_ptr<CUstream_st>> made;
  std::set<std::unique_ptr<CUevent_st>> events;
  Interleaving interleaving = settings().interleaving;
};

Streams& streams() {
  static auto& instance = *new Streams;  // outlives whatever calls the API while the process ends
  return instance;
}

CUstream_st& legacyStream(int device) {
  auto& stream = streams().legacy[device];
  if (!stream) {
    stream = std::make_unique<CUstream_st>();
    stream->device = device;
    stream->legacy = true;
    stream->blocking = true;
  }
  return *stream;
}

std::vector<CUstream_st*> allStreams() {
  std::vector<CUstream_st*> all;
  for (const auto& [device, stream] : streams().legacy) all.push_back(stream.get());
  for (const auto& stream : streams().made) all.push_back(stream.get());
  return all;
}

double now() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Streams that were destroyed live on until their work is done.
void forgetFinishedStreams() {
  auto& made = streams().made;
  made.erase(std::remove_if(made.begin(), made.end(), [](const auto& s) { return s->destroyed && s->queue.empty(); }),
             made.end());
}

bool runnable(const CUstream_st& stream) {
  if (stream.queue.empty()) return false;
  const auto& waits = stream.queue.front()->waits;
  return std::all_of(waits.begin(), waits.end(), [](const OperationPointer& each) { return each->done; });
}

void runWork(const std::function<void()>& work, const std::string& name) {
  try {
    work();
  } catch (const std::exception& error) {
    report(cudaErrorLaunchFailure, name + ": " + error.what());
  }
}

void runFront(CUstream_st& stream) {
  const OperationPointer operation = stream.queue.front();
  // After a fault nothing runs any more, but whoever waits must not wait for ever.
  if (operation->work && blocked() == cudaSuccess) runWork(operation->work, operation->name);
  operation->done = true;
  operation->milliseconds = now();
  operation->work = nullptr;
  operation->waits.clear();
  stream.queue.pop_front();
}

// Marks, stream by stream, how far each must run for `targets` to be done.
void markNeeded(const std::vector<CUstream_st*>& all, std::vector<OperationPointer> targets) {
  for (CUstream_st* stream : all) stream->needed = 0;
  while (!targets.empty()) {
    const OperationPointer target = targets.back();
    targets.pop_back();
    if (target->done) continue;
    CUstream_st& stream = *target->stream;
    for (const OperationPointer& operation : stream.queue) {
      if (operation->sequence > target->sequence) break;
      if (operation->sequence <= stream.needed) continue;
      targets.insert(targets.end(), operation->waits.begin(), operation->waits.end());
    }
    stream.needed = std::max(stream.needed, target->sequence);
  }
}

void finishAll(const std::vector<OperationPointer>& targets) {
  const std::vector<CUstream_st*> all = allStreams();
  if (streams().interleaving == Interleaving::random) {
    for (CUstream_st* stream : all) stream->needed = UINT64_MAX;
  } else {
    markNeeded(all, targets);
  }
  const auto done = [&] {
    return std::all_of(targets.begin(), targets.end(), [](const OperationPointer& each) { return each->done; });
  };
  if (done()) return;
  openDeviceMemory();
  std::vector<CUstream_st*> candidates;
  while (!done()) {
    candidates.clear();
    for (CUstream_st* stream : all) {
      if (runnable(*stream) && stream->queue.front()->sequence <= stream->needed) candidates.push_back(stream);
    }
    if (candidates.empty()) {
      report(cudaErrorLaunchFailure, "queued work waits for itself");
      break;
    }
    runFront(*candidates[randomBelow(candidates.size())]);
  }
  closeDeviceMemory();
  forgetFinishedStreams();
}

void finishStream(const CUstream_st& stream) {
  if (!stream.queue.empty()) finishAll({stream.queue.back()});
}

// The legacy stream waits for all blocking streams of its device, and they for it.
void addImplicitWaits(const CUstream_st& stream, Operation& operation) {
  if (!stream.blocking) return;
  for (const CUstream_st* other : allStreams()) {
    if (other == &stream || other->device != stream.device || !other->blocking || other->queue.empty()) continue;
    if (stream.legacy || other->legacy) operation.waits.push_back(other->queue.back());
  }
}

std::vector<const void*> allocationStarts(const std::vector<const void*>& addresses) {
  std::vector<const void*> starts;
  for (const void* address : addresses) {
    const Found found = findAllocation(address);
    if (found && std::find(starts.begin(), starts.end(), found.start) == starts.end()) starts.push_back(found.start);
  }
  return starts;
}

OperationPointer pushOperation(CUstream_st& stream, Operation given) {
  auto operation = std::make_shared<Operation>(std::move(given));
  operation->stream = &stream;
  operation->sequence = ++stream.pushed;
  addImplicitWaits(stream, *operation);
  stream.queue.push_back(operation);
  return operation;
}

// A blocking stream that captures cannot be waited for by the legacy stream.
cudaError_t refuseImplicitWait(const CUstream_st& stream) {
  if (!stream.legacy) return cudaSuccess;
  for (CUstream_st* other : allStreams()) {
    if (other->device == stream.device && other->blocking && other->capture) {
      return invalidateCapture(other, cudaErrorStreamCaptureImplicit);
    }
  }
  return cudaSuccess;
}

}  // namespace

OperationPointer push(CUstream_st* stream, std::string name, std::function<void()> work, std::vector<const void*> touches,
                      cudaError_t& error) {
  touches = allocationStarts(touches);
  if (stream->capture) {
    error = addNode(stream, {std::move(name), std::move(work), std::move(touches), {}});
    return nullptr;
  }
  error = refuseImplicitWait(*stream);
  if (error != cudaSuccess) return nullptr;
  Operation operation;
  operation.name = std::move(name);
  operation.work = std::move(work);
  operation.touches = std::move(touches);
  return pushOperation(*stream, std::move(operation));
}

CUstream_st* resolveStream(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread) return &legacyStream(currentDevice());
  for (const auto& stream : streams().made) {
    if (stream.get() == handle && !stream->destroyed) return handle;
  }
  return nullptr;
}

bool isCapturing(const CUstream_st* stream) {
  return stream->capture != nullptr;
}
int deviceOf(const CUstream_st* stream) {
  return stream->device;
}
void finish(const OperationPointer& operation) {
  finishAll({operation});
}

std::vector<CUstream_st*> capturingStreams() {
  std::vector<CUstream_st*> all = allStreams();
  all.erase(std::remove_if(all.begin(), all.end(), [](const CUstream_st* s) { return !s->capture; }), all.end());
  return all;
}

const Operation* queuedUser(const void* start) {
  for (const CUstream_st* stream : allStreams()) {
    for (const OperationPointer& operation : stream->queue) {
      const auto& touches = operation->touches;
      if (std::find(touches.begin(), touches.end(), start) != touches.end()) return operation.get();
    }
  }
  return nullptr;
}

void releaseAllStreams() {
  streams() = Streams();
}

cudaError_t enqueue(cudaStream_t handle, const char* name, std::function<void()> work, std::vector<const void*> touches) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  CUstream_st* stream = resolveStream(handle);
  if (!stream) return remember(cudaErrorInvalidResourceHandle);
  cudaError_t error = cudaSuccess;
  push(stream, name, std::move(work), std::move(touches), error);
  return remember(error);
}

void setInterleaving(Interleaving interleaving) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  streams().interleaving = interleaving;
}

size_t queuedOperations() {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  size_t count = 0;
  for (const CUstream_st* stream : allStreams()) count += stream->queue.size();
  return count;
}

}  // namespace cuda_sim

using namespace cuda_sim;

namespace {

using Lock = std::lock_guard<std::recursive_mutex>;

CUevent_st* resolveEvent(cudaEvent_t handle) {
  const auto& events = streams().events;
  const auto found = std::find_if(events.begin(), events.end(), [&](const auto& each) { return each.get() == handle; });
  return found == events.end() ? nullptr : handle;
}

// Waiting is what a capture cannot record.
cudaError_t refuseWait(CUstream_st& stream) {
  return stream.capture ? invalidateCapture(&stream, cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

}  // namespace

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* result, unsigned int flags) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  if (flags > cudaStreamNonBlocking) return remember(cudaErrorInvalidValue);
  streams().made.push_back(std::make_unique<CUstream_st>());
  CUstream_st& stream = *streams().made.back();
  stream.device = currentDevice();
  stream.blocking = !(flags & cudaStreamNonBlocking);
  *result = &stream;
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* result) {
  return cudaStreamCreateWithFlags(result, cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* result, unsigned int flags, int) {
  return cudaStreamCreateWithFlags(result, flags);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const Lock lock(mutex());
  CUstream_st* stream = resolveStream(handle);
  if (!stream || stream->legacy) return remember(cudaErrorInvalidResourceHandle);
  if (stream->capture) invalidateCapture(stream, cudaErrorStreamCaptureInvalidated);
  stream->destroyed = true;
  forgetFinishedStreams();
  return remember(blocked());
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  CUstream_st* stream = resolveStream(handle);
  if (!stream) return remember(cudaErrorInvalidResourceHandle);
  if (const cudaError_t error = refuseWait(*stream)) return remember(error);
  // Whoever waits for the legacy stream waits for the blocking streams too.
  if (stream->legacy) {
    cudaError_t error = cudaSuccess;
    push(stream, "synchronization", nullptr, {}, error);
    if (error != cudaSuccess) return remember(error);
  }
  finishStream(*stream);
  return remember(blocked());
}

// A first answer of "not ready" is always possible; each further question lets one operation run, so that polling ends.
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  CUstream_st* stream = resolveStream(handle);
  if (!stream) return remember(cudaErrorInvalidResourceHandle);
  if (const cudaError_t error = refuseWait(*stream)) return remember(error);
  if (stream->queue.empty()) return cudaSuccess;
  const OperationPointer front = stream->queue.front();
  if (stream->queried != front->sequence) {
    stream->queried = front->sequence;
    return cudaErrorNotReady;
  }
  finish(front);
  if (const cudaError_t error = blocked()) return remember(error);
  return stream->queue.empty() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaDeviceSynchronize() {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  if (const cudaError_t error = refuseInCapture()) return remember(error);
  std::vector<OperationPointer> targets;
  for (const CUstream_st* stream : allStreams()) {
    if (stream->device == currentDevice() && !stream->queue.empty()) targets.push_back(stream->queue.back());
  }
  finishAll(targets);
  return remember(blocked());
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  if (!function) return remember(cudaErrorInvalidValue);
  return enqueue(stream, "host function", [function, data] { function(data); });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* result, unsigned int flags) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  auto event = std::make_unique<CUevent_st>();
  event->timing = !(flags & cudaEventDisableTiming);
  *result = event.get();
  streams().events.insert(std::move(event));
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* result) {
  return cudaEventCreateWithFlags(result, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  const Lock lock(mutex());
  auto& events = streams().events;
  const auto found = std::find_if(events.begin(), events.end(), [&](const auto& each) { return each.get() == handle; });
  if (found == events.end()) return remember(cudaErrorInvalidResourceHandle);
  events.erase(found);
  return remember(blocked());
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t streamHandle) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  CUevent_st* event = resolveEvent(handle);
  CUstream_st* stream = resolveStream(streamHandle);
  if (!event || !stream) return remember(cudaErrorInvalidResourceHandle);
  if (stream->capture) {
    event->recorded = nullptr;
    event->capture = stream->capture;
    event->captured = stream->capturedLast;
    return cudaSuccess;
  }
  cudaError_t error = cudaSuccess;
  event->recorded = push(stream, "event", nullptr, {}, error);
  event->capture = nullptr;
  return remember(error);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t streamHandle, cudaEvent_t handle, unsigned int) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  CUevent_st* event = resolveEvent(handle);
  CUstream_st* stream = resolveStream(streamHandle);
  if (!event || !stream) return remember(cudaErrorInvalidResourceHandle);
  if (event->capture || stream->capture) return remember(waitInCapture(*stream, *event));
  if (!event->recorded || event->recorded->done) return cudaSuccess;
  Operation operation;
  operation.name = "wait for an event";
  operation.waits.push_back(event->recorded);
  pushOperation(*stream, std::move(operation));
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  CUevent_st* event = resolveEvent(handle);
  if (!event) return remember(cudaErrorInvalidResourceHandle);
  if (event->capture) return remember(cudaErrorCapturedEvent);
  if (event->recorded) finish(event->recorded);
  return remember(blocked());
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  CUevent_st* event = resolveEvent(handle);
  if (!event) return remember(cudaErrorInvalidResourceHandle);
  if (event->capture) return remember(cudaErrorCapturedEvent);
  if (!event->recorded || event->recorded->done) return cudaSuccess;
  if (event->queried != event->recorded) {
    event->queried = event->recorded;
    return cudaErrorNotReady;
  }
  finish(event->recorded->stream->queue.front());
  if (const cudaError_t error = blocked()) return remember(error);
  return event->recorded->done ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t startHandle, cudaEvent_t endHandle) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  const CUevent_st* start = resolveEvent(startHandle);
  const CUevent_st* end = resolveEvent(endHandle);
  if (!start || !end || !start->timing || !end->timing || !start->recorded || !end->recorded) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  if (!start->recorded->done || !end->recorded->done) return cudaErrorNotReady;
  *milliseconds = static_cast<float>(end->recorded->milliseconds - start->recorded->milliseconds);
  return cudaSuccess;
}
