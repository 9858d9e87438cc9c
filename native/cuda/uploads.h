// Copies from the host through two pinned buffers: while one is on its way, the next is filled, from wherever the bytes lie:
// an array, or the pages of a mapped file.
#pragma once

#include <cstddef>
#include <functional>

#include "cuda/queue.h"

namespace lora_da::cuda {

class Uploads {
 public:
  explicit Uploads(Queue& queue);
  ~Uploads();
  Uploads(const Uploads&) = delete;

  // `host` may be reused after the call.
  void upload(void* device, const void* host, size_t bytes);
  // The same for bytes that `fill(target, first, count)` writes, piece by piece and in order: a conversion on the way.
  void stream(void* device, size_t bytes, const std::function<void(void* target, size_t first, size_t count)>& fill);

 private:
  static constexpr size_t stageBytes = size_t{8} << 20;
  static constexpr size_t alignment = 256;
  struct Stage {
    char* memory = nullptr;
    cudaEvent_t sent = nullptr;
    size_t used = 0;
  };
  // Room for `bytes` of the stage being filled, or of the other one once its copies are done. Small uploads share a stage, so
  // that a step's do not wait for the step before.
  char* take(size_t bytes);

  Queue& queue_;
  Stage stages_[2];
  int current_ = 0;
};

}  // namespace lora_da::cuda
