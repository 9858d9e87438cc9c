// What a NativeModel object owns: the engine thread, the way back from it to JavaScript, and the calls under way.
//
// JavaScript values (promises, callbacks, the object itself) live in `calls_` and are touched on the JavaScript thread only; the
// engine thread knows a call by its number.
#pragma once

#include <napi.h>

#include <functional>
#include <memory>
#include <unordered_map>

#include "engine.h"

namespace lora_da::bindings {

// Makes a task's JavaScript result, on the JavaScript thread.
using ResultMaker = std::function<Napi::Value(Napi::Env)>;

// What a task left behind: a result or an error.
struct Outcome {
  ResultMaker result;
  std::string errorCode, message;
};

class ModelState {
 public:
  // Makes the arguments of a call's callback.
  using Arguments = std::function<std::vector<napi_value>(Napi::Env)>;
  using Work = std::function<ResultMaker(ModelState&, uint64_t call)>;

  explicit ModelState(Napi::Env env);
  ~ModelState();
  ModelState(const ModelState&) = delete;

  // JavaScript thread: runs `work` on the engine thread and settles the promise with what it returns or throws. `owner` is kept
  // alive and the event loop running until then; `callback` (may be empty) is what notify() calls.
  Napi::Promise submit(Napi::Env env, const Napi::Value& owner, const Napi::Value& callback, Work work);

  // Engine thread: calls the call's callback, in order with its end.
  void notify(uint64_t call, Arguments arguments);

  // JavaScript thread: cancels, frees the model and ends the engine thread; later submissions are refused.
  void close();

  Engine engine;
  bool disposed = false;  // JavaScript thread

 private:
  struct Call {
    Napi::Promise::Deferred deferred;
    Napi::Reference<Napi::Value> owner;
    Napi::FunctionReference callback;
  };
  void send(std::function<void(Napi::Env)> action);
  void finish(Napi::Env env, uint64_t number, const Outcome& outcome);
  static void onEnvironmentExit(void* state);

  napi_env env_;
  Napi::ThreadSafeFunction channel_;
  bool closed_ = false;
  std::unordered_map<uint64_t, Call> calls_;
  uint64_t nextCall_ = 1;
};

// Per environment (the add-on also runs in worker threads).
struct AddonData {
  Napi::FunctionReference modelClass;
  Napi::FunctionReference errorClass;  // LoraDaError of lib/errors.ts: new (code, message)
};

Napi::Value javascriptError(Napi::Env env, const std::string& errorCode, const std::string& message);

}  // namespace lora_da::bindings
