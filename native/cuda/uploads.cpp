#include "cuda/uploads.h"

#include <algorithm>
#include <cstring>

namespace lora_da::cuda {

Uploads::Uploads(Queue& queue) : queue_(queue) {
  for (Stage& stage : stages_) {
    void* memory = nullptr;
    check(cudaMallocHost(&memory, stageBytes), "allocating pinned memory");
    stage.memory = static_cast<char*>(memory);
    check(cudaEventCreateWithFlags(&stage.sent, cudaEventDisableTiming), "creating an event");
  }
}

Uploads::~Uploads() {
  cudaStreamSynchronize(queue_.stream());  // copies may be on their way
  for (const Stage& stage : stages_) {
    if (stage.sent) cudaEventDestroy(stage.sent);
    if (stage.memory) cudaFreeHost(stage.memory);
  }
}

char* Uploads::take(size_t bytes) {
  Stage* stage = &stages_[current_];
  if (stage->used + bytes > stageBytes) {
    check(cudaEventRecord(stage->sent, queue_.stream()), "marking an upload");
    current_ = 1 - current_;
    stage = &stages_[current_];
    check(cudaEventSynchronize(stage->sent), "waiting for an upload");  // at once where it was never recorded
    stage->used = 0;
  }
  char* room = stage->memory + stage->used;
  stage->used += (bytes + alignment - 1) / alignment * alignment;
  return room;
}

void Uploads::upload(void* device, const void* host, size_t bytes) {
  stream(device, bytes,
         [&](void* target, size_t first, size_t count) { std::memcpy(target, static_cast<const char*>(host) + first, count); });
}

void Uploads::stream(void* device, size_t bytes, const std::function<void(void*, size_t, size_t)>& fill) {
  for (size_t first = 0; first < bytes; first += stageBytes) {
    const size_t count = std::min(stageBytes, bytes - first);
    char* room = take(count);
    fill(room, first, count);
    check(cudaMemcpyAsync(static_cast<char*>(device) + first, room, count, cudaMemcpyHostToDevice, queue_.stream()), "uploading");
  }
}

}  // namespace lora_da::cuda
