#include "engine.h"

#include <sys/resource.h>

namespace lora_da::bindings {

Engine::Engine() : thread_([this] { loop(); }) {}

Engine::~Engine() {
  stop();
}

void Engine::release() {
  std::unique_ptr<Decoder> last;  // freed outside the lock: it may take a while
  const std::lock_guard<std::mutex> lock(mutex_);
  last.swap(model);
}

void Engine::post(Task run, Task abandon) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back({std::move(run), std::move(abandon), epoch_});
  }
  wake_.notify_one();
}

void Engine::cancel() {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++epoch_;
  if (model) model->cancelled.store(true);
}

void Engine::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) return;
    stopping_ = true;
    ++epoch_;
    if (model) model->cancelled.store(true);
  }
  wake_.notify_one();
  thread_.join();
}

void Engine::loop() {
  // On Linux this is the calling thread's own priority, and the OpenMP team inherits it: with every core busy, Node's event loop
  // still gets one at once. Relative to the process, so that `nice` counts.
  setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + 5);
  while (true) {
    Entry entry;
    bool abandoned;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) break;
      entry = std::move(queue_.front());
      queue_.pop_front();
      abandoned = entry.epoch != epoch_;
      if (!abandoned && model) model->cancelled.store(false);
    }
    (abandoned ? entry.abandon : entry.run)();
  }
  release();
}

}  // namespace lora_da::bindings
