#include "cuda/queue.h"

#include <algorithm>
#include <cstring>

namespace lora_da::cuda {

namespace {

// A graph for each shape of a step and each number of passes; beyond this many the oldest shapes are hardly met again.
constexpr size_t mostGraphs = 64;

// splitmix64's finalizer (Steele, Lea & Flood 2014).
uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

}  // namespace

Queue::Queue() {
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
}

Queue::~Queue() {
  for (const auto& [key, graph] : graphs_) cudaGraphExecDestroy(graph);
  cudaStreamDestroy(stream_);
}

void Queue::synchronize() {
  check(cudaStreamSynchronize(stream_), "waiting for the device");
}

void Queue::fill(void* device, int byte, size_t bytes) {
  if (bytes == 0) return;
  library([&] { check(cudaMemsetAsync(device, byte, bytes, stream_), "filling memory"); }, device, byte, bytes);
}

void Queue::copy(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  library([&] { check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "copying memory"); }, to, from, bytes);
}

void Queue::noteBytes(const void* bytes, size_t count) {
  const auto* from = static_cast<const unsigned char*>(bytes);
  for (size_t i = 0; i < count; i += sizeof(uint64_t)) {
    uint64_t word = count - i;  // the length, where the last word is not whole
    std::memcpy(&word, from + i, std::min(sizeof word, count - i));
    fingerprint_.first = mix(fingerprint_.first ^ word);
    fingerprint_.second = mix(fingerprint_.second + word + 0x9e3779b97f4a7c15u);
  }
}

void Queue::allowShared(const void* kernel, size_t bytes) {
  size_t& allowed = sharedAllowed_[kernel];
  if (bytes <= allowed) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "asking for shared memory");
  allowed = bytes;
}

cudaGraphExec_t Queue::capture(const std::function<void()>& body) {
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "recording a pass");
  mode_ = Mode::capture;
  cudaGraph_t graph = nullptr;
  try {
    body();
  } catch (...) {
    mode_ = Mode::run;
    cudaStreamEndCapture(stream_, &graph);
    if (graph) cudaGraphDestroy(graph);
    throw;
  }
  mode_ = Mode::run;
  check(cudaStreamEndCapture(stream_, &graph), "recording a pass");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "preparing a recorded pass");
  return executable;
}

Queue::Fingerprint Queue::observe(const std::function<void()>& body) {
  mode_ = Mode::observe;
  fingerprint_ = {};
  try {
    body();
  } catch (...) {
    mode_ = Mode::run;
    throw;
  }
  mode_ = Mode::run;
  return fingerprint_;
}

void Queue::recorded(const std::function<void()>& body) {
  Fingerprint key = observe(body);
  auto found = graphs_.find(key);
  if (found == graphs_.end()) {
    key = observe(body);  // scratch memory that grew just now lies elsewhere for what came before
    found = graphs_.find(key);
  }
  if (found == graphs_.end()) {
    if (graphs_.size() >= mostGraphs) {
      synchronize();
      for (const auto& [other, graph] : graphs_) cudaGraphExecDestroy(graph);
      graphs_.clear();
    }
    found = graphs_.emplace(key, capture(body)).first;
  }
  check(cudaGraphLaunch(found->second, stream_), "starting a recorded pass");
}

}  // namespace lora_da::cuda
