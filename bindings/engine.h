// The engine thread of one model: it owns the model, its device and the OpenMP team, and works off tasks in order. Nothing long
// ever runs on Node's event loop or on libuv's pool.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "model/decoder.h"

namespace lora_da::bindings {

class Engine {
 public:
  using Task = std::function<void()>;

  Engine();
  ~Engine();
  Engine(const Engine&) = delete;

  // Queues `run`; after a cancel() made before it starts, `abandon` runs in its place.
  void post(Task run, Task abandon);
  // Abandons what is queued and stops the work in progress at its next check. Tasks posted later run as usual.
  void cancel();
  // Cancels, frees the model on the engine thread and joins it.
  void stop();

  // Engine thread: frees the model.
  void release();

  std::unique_ptr<Decoder> model;  // made, used and freed on the engine thread

 private:
  struct Entry {
    Task run, abandon;
    uint64_t epoch;
  };
  void loop();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Entry> queue_;
  uint64_t epoch_ = 0;  // counts cancel() calls
  bool stopping_ = false;
  std::thread thread_;  // last: it starts when everything else is there
};

}  // namespace lora_da::bindings
