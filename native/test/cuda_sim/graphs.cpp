// Captures and graphs: what a capturing stream gets is kept as nodes, and run at each launch of the graph in an order that the
// dependencies allow.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <thread>

#include "simulator.h"
#include "streams.h"

struct CUgraph_st {
  std::vector<cuda_sim::Node> nodes;
};

struct CUgraphExec_st {
  std::shared_ptr<const CUgraph_st> graph;
};

namespace cuda_sim {

struct Capture {
  std::unique_ptr<CUgraph_st> graph = std::make_unique<CUgraph_st>();
  CUstream_st* origin = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread;
  bool invalid = false;
};

namespace {

struct Graphs {
  std::vector<std::unique_ptr<CUgraph_st>> graphs;
  std::vector<std::unique_ptr<CUgraphExec_st>> executables;
};

Graphs& graphs() {
  static auto& instance = *new Graphs;
  return instance;
}

template <class T>
bool eraseHandle(std::vector<std::unique_ptr<T>>& all, const T* handle) {
  const auto found = std::find_if(all.begin(), all.end(), [&](const auto& each) { return each.get() == handle; });
  if (found == all.end()) return false;
  all.erase(found);
  return true;
}

template <class T>
bool isHandle(const std::vector<std::unique_ptr<T>>& all, const T* handle) {
  return std::any_of(all.begin(), all.end(), [&](const auto& each) { return each.get() == handle; });
}

// Whether every node comes before the last ones of the stream that began the capture.
bool allJoined(const Capture& capture) {
  const auto& nodes = capture.graph->nodes;
  std::vector<bool> reached(nodes.size());
  std::vector<size_t> open = capture.origin->capturedLast;
  while (!open.empty()) {
    const size_t node = open.back();
    open.pop_back();
    if (reached[node]) continue;
    reached[node] = true;
    open.insert(open.end(), nodes[node].waits.begin(), nodes[node].waits.end());
  }
  return std::all_of(reached.begin(), reached.end(), [](bool each) { return each; });
}

void leaveCapture(const std::shared_ptr<Capture>& capture) {
  for (CUstream_st* stream : capturingStreams()) {
    if (stream->capture != capture) continue;
    stream->capture = nullptr;
    stream->capturedLast.clear();
  }
}

// Whether a call of this thread that a capture may not hold is a mistake.
bool forbids(const Capture& capture) {
  switch (capture.mode) {
    case cudaStreamCaptureModeGlobal: return true;
    case cudaStreamCaptureModeThreadLocal: return capture.thread == std::this_thread::get_id();
    case cudaStreamCaptureModeRelaxed: return false;
  }
  return true;
}

void runNodes(const CUgraph_st& graph) {
  std::vector<std::vector<size_t>> followers(graph.nodes.size());
  std::vector<size_t> waiting(graph.nodes.size());
  std::vector<size_t> runnable;
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    for (size_t wait : graph.nodes[i].waits) followers[wait].push_back(i);
    waiting[i] = graph.nodes[i].waits.size();
    if (waiting[i] == 0) runnable.push_back(i);
  }
  while (!runnable.empty() && blocked() == cudaSuccess) {
    std::swap(runnable[randomBelow(runnable.size())], runnable.back());
    const size_t chosen = runnable.back();
    runnable.pop_back();
    if (graph.nodes[chosen].work) graph.nodes[chosen].work();
    for (size_t follower : followers[chosen]) {
      if (--waiting[follower] == 0) runnable.push_back(follower);
    }
  }
}

}  // namespace

cudaError_t invalidateCapture(CUstream_st* stream, cudaError_t error) {
  stream->capture->invalid = true;
  return error;
}

cudaError_t refuseInCapture() {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  cudaError_t error = cudaSuccess;
  for (CUstream_st* stream : capturingStreams()) {
    if (forbids(*stream->capture)) error = invalidateCapture(stream, cudaErrorStreamCaptureUnsupported);
  }
  return error;
}

cudaError_t addNode(CUstream_st* stream, Node node) {
  if (stream->capture->invalid) return cudaErrorStreamCaptureInvalidated;
  auto& nodes = stream->capture->graph->nodes;
  node.waits = stream->capturedLast;
  nodes.push_back(std::move(node));
  stream->capturedLast = {nodes.size() - 1};
  return cudaSuccess;
}

cudaError_t waitInCapture(CUstream_st& stream, const CUevent_st& event) {
  if (!event.capture) return invalidateCapture(&stream, cudaErrorStreamCaptureIsolation);
  if (stream.capture && stream.capture != event.capture) return invalidateCapture(&stream, cudaErrorStreamCaptureIsolation);
  // The capture that the event is of may be over.
  if (!stream.capture && !event.capture->origin) return cudaErrorInvalidValue;
  stream.capture = event.capture;
  for (size_t node : event.captured) {
    auto& last = stream.capturedLast;
    if (std::find(last.begin(), last.end(), node) == last.end()) last.push_back(node);
  }
  return cudaSuccess;
}

void releaseAllGraphs() {
  graphs() = Graphs();
}

}  // namespace cuda_sim

using namespace cuda_sim;

namespace {
using Lock = std::lock_guard<std::recursive_mutex>;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  CUstream_st* stream = resolveStream(handle);
  if (!stream) return remember(cudaErrorInvalidResourceHandle);
  if (stream->legacy) return remember(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return remember(cudaErrorIllegalState);
  stream->capture = std::make_shared<Capture>();
  stream->capture->origin = stream;
  stream->capture->mode = mode;
  stream->capture->thread = std::this_thread::get_id();
  stream->capturedLast.clear();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* result) {
  const Lock lock(mutex());
  *result = nullptr;
  if (const cudaError_t error = blocked()) return remember(error);
  CUstream_st* stream = resolveStream(handle);
  if (!stream) return remember(cudaErrorInvalidResourceHandle);
  if (!stream->capture) return remember(cudaErrorIllegalState);
  const std::shared_ptr<Capture> capture = stream->capture;
  if (capture->origin != stream) return remember(invalidateCapture(stream, cudaErrorStreamCaptureUnmatched));
  const bool joined = allJoined(*capture);
  leaveCapture(capture);
  capture->origin = nullptr;
  if (capture->invalid) return remember(cudaErrorStreamCaptureInvalidated);
  if (!joined) return remember(cudaErrorStreamCaptureUnjoined);
  *result = capture->graph.get();
  graphs().graphs.push_back(std::move(capture->graph));
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  const CUstream_st* stream = resolveStream(handle);
  if (!stream) return remember(cudaErrorInvalidResourceHandle);
  *status = !stream->capture           ? cudaStreamCaptureStatusNone
            : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                       : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* result, cudaGraph_t graph, unsigned long long) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  if (!isHandle(graphs().graphs, graph)) return remember(cudaErrorInvalidValue);
  auto executable = std::make_unique<CUgraphExec_st>();
  executable->graph = std::make_shared<CUgraph_st>(*graph);
  *result = executable.get();
  graphs().executables.push_back(std::move(executable));
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* result, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(result, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  CUstream_st* stream = resolveStream(handle);
  if (!stream || !isHandle(graphs().executables, executable)) return remember(cudaErrorInvalidResourceHandle);
  const std::shared_ptr<const CUgraph_st> graph = executable->graph;
  std::vector<const void*> touches;
  for (const Node& node : graph->nodes) touches.insert(touches.end(), node.touches.begin(), node.touches.end());
  cudaError_t error = cudaSuccess;
  push(
      stream, "graph", [graph] { runNodes(*graph); }, std::move(touches), error);
  return remember(error);
}

cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  return isHandle(graphs().executables, executable) ? cudaSuccess : remember(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  const Lock lock(mutex());
  if (const cudaError_t error = blocked()) return remember(error);
  if (!isHandle(graphs().graphs, graph) || nodes) return remember(cudaErrorInvalidValue);  // only the number is known here
  *count = graph->nodes.size();
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  const Lock lock(mutex());
  if (!eraseHandle(graphs().executables, executable)) return remember(cudaErrorInvalidValue);
  return remember(blocked());
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const Lock lock(mutex());
  if (!eraseHandle(graphs().graphs, graph)) return remember(cudaErrorInvalidValue);
  return remember(blocked());
}
