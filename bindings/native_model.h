// The JavaScript class over one model: every method queues work on the engine thread and returns a promise (types:
// lib/native.ts).
#pragma once

#include <napi.h>

#include <memory>

#include "model_state.h"

namespace lora_da::bindings {

class NativeModel : public Napi::ObjectWrap<NativeModel> {
 public:
  static Napi::Function define(Napi::Env env);
  // loadModel(options, onProgress) -> Promise<NativeModel>
  static Napi::Value load(const Napi::CallbackInfo& info);
  // devices() -> Promise<NativeDevices>
  static Napi::Value devices(const Napi::CallbackInfo& info);

  explicit NativeModel(const Napi::CallbackInfo& info) : ObjectWrap(info) {}

 private:
  // Runs work(object, state, call number) on the engine thread of a new object, which lives until then at least.
  template <class Work>
  static Napi::Value onNewEngine(Napi::Env env, const Napi::Value& callback, Work work);
  // Runs work(model, state, call number) on the engine thread; it returns what makes the JavaScript result.
  template <class Work>
  Napi::Value queue(const Napi::CallbackInfo& info, const Napi::Value& callback, Work work);
  template <class Work>
  Napi::Value queue(const Napi::CallbackInfo& info, Work work);

  Napi::Value info(const Napi::CallbackInfo& info);
  Napi::Value addLora(const Napi::CallbackInfo& info);
  Napi::Value removeLora(const Napi::CallbackInfo& info);
  Napi::Value readFactors(const Napi::CallbackInfo& info);
  Napi::Value writeFactors(const Napi::CallbackInfo& info);
  Napi::Value readMoments(const Napi::CallbackInfo& info);
  Napi::Value writeMoments(const Napi::CallbackInfo& info);
  Napi::Value trainStep(const Napi::CallbackInfo& info);
  Napi::Value evaluate(const Napi::CallbackInfo& info);
  Napi::Value logits(const Napi::CallbackInfo& info);
  Napi::Value planInitialization(const Napi::CallbackInfo& info);
  Napi::Value initialize(const Napi::CallbackInfo& info);
  Napi::Value collect(const Napi::CallbackInfo& info);
  Napi::Value generate(const Napi::CallbackInfo& info);
  Napi::Value mergedWeight(const Napi::CallbackInfo& info);
  Napi::Value planMemory(const Napi::CallbackInfo& info);
  Napi::Value profile(const Napi::CallbackInfo& info);
  Napi::Value resetProfile(const Napi::CallbackInfo& info);
  Napi::Value cancel(const Napi::CallbackInfo& info);
  Napi::Value dispose(const Napi::CallbackInfo& info);

  std::unique_ptr<ModelState> state_;
  Napi::ObjectReference info_;
};

}  // namespace lora_da::bindings
