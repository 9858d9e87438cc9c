// From the engine thread back to JavaScript: one thread-safe function per model, which keeps the process alive only while work is pending.
#pragma once

#include <napi.h>

#include <functional>
#include <memory>

namespace lora_da::bindings {

class Channel {
 public:
  using Callback = std::function<void(Napi::Env)>;

  explicit Channel(Napi::Env env)
      : function_(Napi::ThreadSafeFunction::New(env, Napi::Function::New(env, [](const Napi::CallbackInfo&) {}), "lora-da engine", 0, 1)) {
    function_.Unref(env);
  }
  ~Channel() { function_.Release(); }
  Channel(const Channel&) = delete;

  // JavaScript thread: between these two the event loop stays alive.
  void begin(Napi::Env env) {
    if (pending_++ == 0) function_.Ref(env);
  }
  void end(Napi::Env env) {
    if (--pending_ == 0) function_.Unref(env);
  }

  // Any thread: runs `callback` on the JavaScript thread; dropped when the environment is closing.
  void send(Callback callback) {
    auto* boxed = new Callback(std::move(callback));
    const napi_status status = function_.NonBlockingCall(boxed, [](Napi::Env env, Napi::Function, Callback* call) {
      const std::unique_ptr<Callback> owner(call);
      if (static_cast<napi_env>(env) != nullptr) (*call)(env);
    });
    if (status != napi_ok) delete boxed;
  }

 private:
  Napi::ThreadSafeFunction function_;
  int pending_ = 0;
};

}  // namespace lora_da::bindings
