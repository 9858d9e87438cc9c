#include "native_model.h"

#include <chrono>
#include <new>

#include "convert.h"
#include "core/cpu_info.h"
#include "core/error.h"
#include "core/memory_info.h"

namespace lora_da::bindings {

namespace {

Napi::Error javascriptError(Napi::Env env, const char* errorCode, const std::string& message) {
  Napi::Error error = Napi::Error::New(env, message);
  error.Set("code", Napi::String::New(env, errorCode));
  return error;
}

// What a task left behind: a result for JavaScript or an error.
struct Outcome {
  std::function<Napi::Value(Napi::Env)> value;
  std::string errorCode, message;
};

template <class Work>
Outcome attempt(Work&& work) {
  try {
    return {work(), "", ""};
  } catch (const Error& error) {
    return {nullptr, error.code(), error.what()};
  } catch (const std::bad_alloc&) {
    return {nullptr, code::outOfMemory, "the system is out of memory"};
  } catch (const std::exception& error) {
    return {nullptr, code::internal, error.what()};
  }
}

void settle(Napi::Env env, const Napi::Promise::Deferred& deferred, const Outcome& outcome) {
  const Napi::HandleScope scope(env);
  if (outcome.value) deferred.Resolve(outcome.value(env));
  else deferred.Reject(javascriptError(env, outcome.errorCode.c_str(), outcome.message).Value());
}

// Runs work(model) on the engine thread; it returns a function that makes the JavaScript result. `owner` stays alive until then.
template <class Work>
Napi::Value queue(Napi::Env env, const Napi::Object& owner, const std::shared_ptr<ModelState>& state, Work work) {
  const auto deferred = Napi::Promise::Deferred::New(env);
  if (state->disposed) {
    deferred.Reject(javascriptError(env, "DISPOSED", "the model was used after dispose()").Value());
    return deferred.Promise();
  }
  state->channel.begin(env);
  auto keep = std::make_shared<Napi::ObjectReference>(Napi::Persistent(owner));
  const auto finish = [state = state.get(), deferred, keep](Outcome outcome) {
    state->channel.send([state, deferred, keep, outcome = std::move(outcome)](Napi::Env env) {
      settle(env, deferred, outcome);
      keep->Reset();
      state->channel.end(env);
    });
  };
  state->engine.post([state = state.get(), work = std::move(work), finish]() mutable { finish(attempt([&] { return work(*state->engine.model); })); },
                     [finish] { finish({nullptr, code::aborted, "the operation was aborted"}); });
  return deferred.Promise();
}

const auto undefined = [](Napi::Env env) { return env.Undefined(); };

using CallbackReference = std::shared_ptr<Napi::FunctionReference>;

CallbackReference keepFunction(const Napi::Value& value) {
  return std::make_shared<Napi::FunctionReference>(Napi::Persistent(value.As<Napi::Function>()));
}

size_t packBudget(double requested, DType type, int64_t parameters) {
  if (requested >= 0) return static_cast<size_t>(requested);
  // Packed copies for forward and backward take twice the weights; half of the free memory is left for everything else.
  (void)type;
  (void)parameters;
  return availableMemory() / 2;
}

}  // namespace

Napi::Function NativeModel::define(Napi::Env env) {
  return DefineClass(env, "NativeModel",
                     {InstanceAccessor<&NativeModel::info>("info"), InstanceMethod<&NativeModel::addLora>("addLora"),
                      InstanceMethod<&NativeModel::removeLora>("removeLora"), InstanceMethod<&NativeModel::readFactors>("readFactors"),
                      InstanceMethod<&NativeModel::writeFactors>("writeFactors"), InstanceMethod<&NativeModel::readMoments>("readMoments"),
                      InstanceMethod<&NativeModel::writeMoments>("writeMoments"), InstanceMethod<&NativeModel::trainStep>("trainStep"),
                      InstanceMethod<&NativeModel::evaluate>("evaluate"), InstanceMethod<&NativeModel::logits>("logits"),
                      InstanceMethod<&NativeModel::initialize>("initialize"), InstanceMethod<&NativeModel::collect>("collect"),
                      InstanceMethod<&NativeModel::generate>("generate"), InstanceMethod<&NativeModel::mergedWeight>("mergedWeight"),
                      InstanceMethod<&NativeModel::planMemory>("planMemory"), InstanceMethod<&NativeModel::cancel>("cancel"),
                      InstanceMethod<&NativeModel::dispose>("dispose")});
}

NativeModel::NativeModel(const Napi::CallbackInfo& info) : ObjectWrap(info) {}

NativeModel::~NativeModel() = default;

Napi::Value NativeModel::load(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto options = info[0].As<Napi::Object>();
  DecoderSpec spec = toSpec(options.Get("spec").As<Napi::Object>());
  std::vector<TensorSource> tensors = toTensors(options.Get("tensors").As<Napi::Array>());
  const std::string dtype = text(options, "dtype");
  DeviceOptions device;
  device.device = text(options, "device");
  device.threads = static_cast<int>(integer(options, "threads"));
  device.computeType = dtype == "bfloat16" || (dtype == "auto" && hasBfloat16Products()) ? DType::bf16 : DType::f32;
  device.packBudget = packBudget(number(options, "packBudget"), device.computeType, 0);

  const CallbackReference onProgress = keepFunction(info[1]);
  const auto state = std::make_shared<ModelState>(env);
  const auto deferred = Napi::Promise::Deferred::New(env);
  state->channel.begin(env);

  const int threads = device.threads > 0 ? device.threads : physicalCores();
  const auto finish = [state, deferred, onProgress, device, threads](Outcome outcome, int64_t parameters) {
    state->channel.send([state, deferred, onProgress, device, threads, parameters, outcome = std::move(outcome)](Napi::Env env) {
      const Napi::HandleScope scope(env);
      state->channel.end(env);
      onProgress->Reset();
      if (!outcome.value) {
        settle(env, deferred, outcome);
        return;
      }
      const Napi::Object object = env.GetInstanceData<AddonData>()->modelClass.New({});
      NativeModel* model = Unwrap(object);
      auto description = Napi::Object::New(env);
      description.Set("device", "cpu");
      description.Set("dtype", nameOf(device.computeType));
      description.Set("threads", threads);
      description.Set("parameters", static_cast<double>(parameters));
      description.Set("weightBytes", static_cast<double>(parameters) * static_cast<double>(sizeOf(device.computeType)));
      model->info_ = Napi::Persistent(description);
      model->state_ = state;
      deferred.Resolve(object);
    });
  };
  state->engine.post(
      [state = state.get(), spec = std::move(spec), tensors = std::move(tensors), device, onProgress, finish]() mutable {
        int64_t parameters = 0;
        const Outcome outcome = attempt([&]() -> std::function<Napi::Value(Napi::Env)> {
          state->engine.model = std::make_unique<Decoder>(std::move(spec), std::move(tensors), device, [&](int64_t done, int64_t total) {
            state->channel.send([onProgress, done, total](Napi::Env env) {
              if (!onProgress->IsEmpty()) onProgress->Call({Napi::Number::New(env, static_cast<double>(done)), Napi::Number::New(env, static_cast<double>(total))});
            });
          });
          parameters = state->engine.model->parameters();
          return undefined;
        });
        finish(outcome, parameters);
      },
      [finish] { finish({nullptr, code::aborted, "the operation was aborted"}, 0); });
  return deferred.Promise();
}

Napi::Value NativeModel::info(const Napi::CallbackInfo&) { return info_.Value(); }

Napi::Value NativeModel::addLora(const Napi::CallbackInfo& info) {
  const auto options = info[0].As<Napi::Object>();
  return queue(info.Env(), Value(), state_,
               [modules = toStrings(options.Get("modules").As<Napi::Array>()), rank = integer(options, "rank"),
                scaling = static_cast<float>(number(options, "scaling"))](Decoder& model) {
                 model.addLora(modules, rank, scaling);
                 return undefined;
               });
}

Napi::Value NativeModel::removeLora(const Napi::CallbackInfo& info) {
  return queue(info.Env(), Value(), state_, [](Decoder& model) {
    model.removeLora();
    return undefined;
  });
}

namespace {

LoraSet& adaptersOf(Decoder& model) {
  if (!model.lora()) throw Error(code::invalidArgument, "the model has no adapters");
  return *model.lora();
}

constexpr FactorKeys factorKeys{"a", "b"}, firstKeys{"aFirst", "bFirst"}, secondKeys{"aSecond", "bSecond"};

}  // namespace

Napi::Value NativeModel::readFactors(const Napi::CallbackInfo& info) {
  return queue(info.Env(), Value(), state_, [](Decoder& model) {
    auto factors = adaptersOf(model).read(model.device(), LoraSet::Array::value);
    return [factors = std::move(factors)](Napi::Env env) -> Napi::Value {
      auto array = Napi::Array::New(env);
      fromFactors(env, array, factors, factorKeys);
      return array;
    };
  });
}

Napi::Value NativeModel::writeFactors(const Napi::CallbackInfo& info) {
  return queue(info.Env(), Value(), state_, [factors = toFactors(info[0].As<Napi::Array>(), factorKeys)](Decoder& model) {
    adaptersOf(model).write(model.device(), LoraSet::Array::value, factors);
    return undefined;
  });
}

Napi::Value NativeModel::readMoments(const Napi::CallbackInfo& info) {
  return queue(info.Env(), Value(), state_, [](Decoder& model) {
    auto first = adaptersOf(model).read(model.device(), LoraSet::Array::firstMoment);
    auto second = adaptersOf(model).read(model.device(), LoraSet::Array::secondMoment);
    return [first = std::move(first), second = std::move(second)](Napi::Env env) -> Napi::Value {
      auto array = Napi::Array::New(env);
      fromFactors(env, array, first, firstKeys);
      fromFactors(env, array, second, secondKeys);
      return array;
    };
  });
}

Napi::Value NativeModel::writeMoments(const Napi::CallbackInfo& info) {
  const auto array = info[0].As<Napi::Array>();
  return queue(info.Env(), Value(), state_, [first = toFactors(array, firstKeys), second = toFactors(array, secondKeys)](Decoder& model) {
    adaptersOf(model).write(model.device(), LoraSet::Array::firstMoment, first);
    adaptersOf(model).write(model.device(), LoraSet::Array::secondMoment, second);
    return undefined;
  });
}

Napi::Value NativeModel::trainStep(const Napi::CallbackInfo& info) {
  return queue(info.Env(), Value(), state_,
               [batches = toBatches(info[0].As<Napi::Array>()), options = toStepOptions(info[1].As<Napi::Object>())](Decoder& model) {
                 const auto start = std::chrono::steady_clock::now();
                 const StepResult result = model.trainStep(batches, options);
                 const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
                 return [result, seconds](Napi::Env env) -> Napi::Value {
                   auto object = Napi::Object::New(env);
                   object.Set("loss", result.loss);
                   object.Set("gradNorm", result.gradNorm);
                   object.Set("seconds", seconds);
                   return object;
                 };
               });
}

Napi::Value NativeModel::evaluate(const Napi::CallbackInfo& info) {
  return queue(info.Env(), Value(), state_, [batch = toBatch(info[0].As<Napi::Object>())](Decoder& model) {
    return [result = model.evaluate(batch)](Napi::Env env) -> Napi::Value {
      auto object = Napi::Object::New(env);
      object.Set("losses", typedArray<Napi::Float64Array>(env, result.losses));
      object.Set("labelTokens", typedArray<Napi::Int32Array>(env, result.labelTokens));
      return object;
    };
  });
}

Napi::Value NativeModel::logits(const Napi::CallbackInfo& info) {
  return queue(info.Env(), Value(), state_, [batch = toBatch(info[0].As<Napi::Object>())](Decoder& model) {
    return [logits = model.logits(batch)](Napi::Env env) -> Napi::Value { return typedArray<Napi::Float32Array>(env, logits); };
  });
}

Napi::Value NativeModel::initialize(const Napi::CallbackInfo& info) {
  const CallbackReference onProgress = keepFunction(info[2]);
  return queue(info.Env(), Value(), state_,
               [state = state_.get(), onProgress, batches = toBatches(info[0].As<Napi::Array>()),
                initialization = toInitialization(info[1].As<Napi::Object>())](Decoder& model) {
                 const auto progress = [&](InitializationPhase phase, int64_t done, int64_t total) {
                   if (model.cancelled.load()) throw Error(code::aborted, "the operation was aborted");
                   state->channel.send([onProgress, phase, done, total](Napi::Env env) {
                     if (onProgress->IsEmpty()) return;
                     onProgress->Call({Napi::String::New(env, phase == InitializationPhase::collect ? "collect" : "solve"),
                                       Napi::Number::New(env, static_cast<double>(done)), Napi::Number::New(env, static_cast<double>(total))});
                   });
                 };
                 const int64_t rank = model.lora() ? model.lora()->rank() : 0;
                 return [onProgress, rank, result = initializeAdapters(model, batches, initialization, progress)](Napi::Env env) -> Napi::Value {
                   onProgress->Reset();
                   const Napi::Value report = fromReport(env, result);
                   const auto modules = report.As<Napi::Object>().Get("modules").As<Napi::Array>();
                   for (uint32_t i = 0; i < modules.Length(); ++i) modules.Get(i).As<Napi::Object>().Set("rank", static_cast<double>(rank));
                   return report;
                 };
               });
}

Napi::Value NativeModel::collect(const Napi::CallbackInfo& info) {
  struct ModuleStatistics {
    std::string module;
    std::vector<float> gradient, inputMoment;
    std::vector<double> outputFactor;
  };
  return queue(info.Env(), Value(), state_,
               [batches = toBatches(info[0].As<Napi::Array>()), mask = toTokenMask(info[1].ToString().Utf8Value())](Decoder& model) {
                 const Statistics statistics = collectStatistics(model, batches, {true, true, true}, mask, [](auto...) {});
                 std::vector<ModuleStatistics> modules;
                 for (size_t i = 0; i < model.projections().size(); ++i) {
                   if (model.lora() && !model.lora()->group(i)) continue;
                   const GroupStatistics group = statistics.read(i);
                   const Projection& projection = *model.projections()[i];
                   for (const ProjectionPart& part : projection.parts) {
                     const auto rows = group.gradient.begin() + part.offset * projection.in;
                     modules.push_back({part.module,
                                        {rows, rows + part.out * projection.in},
                                        group.inputMoment,
                                        {group.outputFactor.begin() + part.offset, group.outputFactor.begin() + part.offset + part.out}});
                   }
                 }
                 return [modules = std::move(modules)](Napi::Env env) -> Napi::Value {
                   auto array = Napi::Array::New(env, modules.size());
                   for (uint32_t i = 0; i < modules.size(); ++i) {
                     auto object = Napi::Object::New(env);
                     object.Set("module", modules[i].module);
                     object.Set("gradient", typedArray<Napi::Float32Array>(env, modules[i].gradient));
                     object.Set("inputMoment", typedArray<Napi::Float32Array>(env, modules[i].inputMoment));
                     object.Set("outputFactor", typedArray<Napi::Float64Array>(env, modules[i].outputFactor));
                     array.Set(i, object);
                   }
                   return array;
                 };
               });
}

Napi::Value NativeModel::generate(const Napi::CallbackInfo& info) {
  const CallbackReference onToken = keepFunction(info[1]);
  return queue(info.Env(), Value(), state_,
               [state = state_.get(), onToken, options = toGenerateOptions(info[0].As<Napi::Object>())](Decoder& model) {
                 auto ids = model.generate(options, [&](int32_t id) {
                   state->channel.send([onToken, id](Napi::Env env) {
                     if (!onToken->IsEmpty()) onToken->Call({Napi::Number::New(env, id)});
                   });
                 });
                 return [onToken, ids = std::move(ids)](Napi::Env env) -> Napi::Value {
                   onToken->Reset();
                   return typedArray<Napi::Int32Array>(env, ids);
                 };
               });
}

Napi::Value NativeModel::mergedWeight(const Napi::CallbackInfo& info) {
  return queue(info.Env(), Value(), state_, [module = info[0].ToString().Utf8Value()](Decoder& model) {
    return [merged = model.mergedWeight(module)](Napi::Env env) -> Napi::Value { return typedArray<Napi::Float32Array>(env, merged); };
  });
}

Napi::Value NativeModel::planMemory(const Napi::CallbackInfo& info) {
  const int64_t tokens = info[0].ToNumber().Int64Value(), labels = info[1].ToNumber().Int64Value();
  return queue(info.Env(), Value(), state_, [tokens, labels, recompute = toRecompute(info[3].ToString().Utf8Value())](Decoder& model) {
    return [plan = model.planMemory(tokens, labels, recompute)](Napi::Env env) -> Napi::Value {
      auto object = Napi::Object::New(env);
      object.Set("weights", static_cast<double>(plan.weights));
      object.Set("activations", static_cast<double>(plan.activations));
      object.Set("adapters", static_cast<double>(plan.adapters));
      object.Set("workspace", static_cast<double>(plan.workspace));
      return object;
    };
  });
}

Napi::Value NativeModel::cancel(const Napi::CallbackInfo& info) {
  if (!state_->disposed) state_->engine.cancel();
  return info.Env().Undefined();
}

Napi::Value NativeModel::dispose(const Napi::CallbackInfo& info) {
  const auto deferred = Napi::Promise::Deferred::New(info.Env());
  if (state_->disposed) {
    deferred.Resolve(info.Env().Undefined());
    return deferred.Promise();
  }
  state_->engine.cancel();
  const Napi::Value freed = queue(info.Env(), Value(), state_, [engine = &state_->engine](Decoder&) {
    engine->model.reset();
    return undefined;
  });
  state_->disposed = true;
  return freed;
}

}  // namespace lora_da::bindings
