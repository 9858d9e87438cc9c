#include "model_state.h"

#include <utility>

#include "core/error.h"

namespace lora_da::bindings {

namespace {

template <class Work>
Outcome attempt(Work&& work) {
  try {
    return {work(), "", ""};
  } catch (const std::exception&) {
    ErrorText error = handledError();
    return {nullptr, std::move(error.code), std::move(error.message)};
  }
}

}  // namespace

Napi::Value javascriptError(Napi::Env env, const std::string& errorCode, const std::string& message) {
  return env.GetInstanceData<AddonData>()->errorClass.New({Napi::String::New(env, errorCode), Napi::String::New(env, message)});
}

ModelState::ModelState(Napi::Env env)
    : env_(env),
      channel_(Napi::ThreadSafeFunction::New(env, Napi::Function::New(env, [](const Napi::CallbackInfo&) {}), "lora-da engine", 0,
                                             1)) {
  channel_.Unref(env);
  // Hooks run last in, first out: this one before the channel's own, so that the engine is quiet when the channel goes.
  napi_add_env_cleanup_hook(env, onEnvironmentExit, this);
}

ModelState::~ModelState() {
  if (closed_) return;
  napi_remove_env_cleanup_hook(env_, onEnvironmentExit, this);
  close();
}

void ModelState::onEnvironmentExit(void* state) {
  static_cast<ModelState*>(state)->close();
}

void ModelState::close() {
  if (closed_) return;
  closed_ = true;
  disposed = true;
  engine.stop();
  channel_.Release();
}

void ModelState::send(std::function<void(Napi::Env)> action) {
  using Action = std::function<void(Napi::Env)>;
  auto boxed = std::make_unique<Action>(std::move(action));
  const napi_status status = channel_.NonBlockingCall(boxed.get(), [](Napi::Env env, Napi::Function, Action* call) {
    const std::unique_ptr<Action> owner(call);
    if (static_cast<napi_env>(env) == nullptr) return;  // the environment is closing
    const Napi::HandleScope scope(env);
    try {
      (*call)(env);
    } catch (const Napi::Error& error) {
      // A callback threw: Node reports it as uncaught. Or a worker is being terminated and no JavaScript runs any more: nothing
      // is left to do.
      error.ThrowAsJavaScriptException();
    }
  });
  if (status == napi_ok) boxed.release();
}

Napi::Promise ModelState::submit(Napi::Env env, const Napi::Value& owner, const Napi::Value& callback, Work work) {
  const auto deferred = Napi::Promise::Deferred::New(env);
  if (disposed) {
    deferred.Reject(javascriptError(env, "DISPOSED", "the model was used after dispose()"));
    return deferred.Promise();
  }
  const uint64_t number = nextCall_++;
  Call call{deferred, Napi::Reference<Napi::Value>::New(owner, 1), {}};
  if (callback.IsFunction()) call.callback = Napi::Persistent(callback.As<Napi::Function>());
  if (calls_.empty()) channel_.Ref(env);
  calls_.emplace(number, std::move(call));

  const auto end = [this, number](Outcome outcome) {
    send([this, number, outcome = std::move(outcome)](Napi::Env env) { finish(env, number, outcome); });
  };
  engine.post([this, number, work = std::move(work), end] { end(attempt([&] { return work(*this, number); })); },
              [end] {
                end({nullptr, code::aborted, "the operation was aborted"});
              });
  return deferred.Promise();
}

void ModelState::notify(uint64_t number, Arguments arguments) {
  send([this, number, arguments = std::move(arguments)](Napi::Env env) {
    const auto call = calls_.find(number);
    if (call != calls_.end() && !call->second.callback.IsEmpty()) call->second.callback.Call(arguments(env));
  });
}

void ModelState::finish(Napi::Env env, uint64_t number, const Outcome& outcome) {
  const auto found = calls_.find(number);
  const Call call = std::move(found->second);
  calls_.erase(found);
  if (calls_.empty()) channel_.Unref(env);
  if (outcome.result)
    call.deferred.Resolve(outcome.result(env));
  else
    call.deferred.Reject(javascriptError(env, outcome.errorCode, outcome.message));
}

}  // namespace lora_da::bindings
