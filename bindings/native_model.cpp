#include "native_model.h"

#include <chrono>

#include "convert.h"
#include "core/cpu_info.h"
#include "core/device_factory.h"
#include "core/error.h"
#include "core/memory_info.h"
#include "core/profiled_device.h"

namespace lora_da::bindings {

namespace {

ResultMaker undefined() {
  return [](Napi::Env env) { return env.Undefined(); };
}

Napi::Number toNumber(Napi::Env env, int64_t value) {
  return Napi::Number::New(env, static_cast<double>(value));
}

// Copies of weights may take half of the free memory; the rest is left for everything else, and weights beyond it are read in
// their file, whose pages the system can drop and read again.
size_t copyBudget(double requested) {
  return requested >= 0 ? static_cast<size_t>(requested) : availableMemory() / 2;
}

}  // namespace

Napi::Function NativeModel::define(Napi::Env env) {
  return DefineClass(env, "NativeModel",
                     {InstanceAccessor<&NativeModel::info>("info"),
                      InstanceMethod<&NativeModel::addLora>("addLora"),
                      InstanceMethod<&NativeModel::removeLora>("removeLora"),
                      InstanceMethod<&NativeModel::readFactors>("readFactors"),
                      InstanceMethod<&NativeModel::writeFactors>("writeFactors"),
                      InstanceMethod<&NativeModel::readMoments>("readMoments"),
                      InstanceMethod<&NativeModel::writeMoments>("writeMoments"),
                      InstanceMethod<&NativeModel::trainStep>("trainStep"),
                      InstanceMethod<&NativeModel::evaluate>("evaluate"),
                      InstanceMethod<&NativeModel::logits>("logits"),
                      InstanceMethod<&NativeModel::planInitialization>("planInitialization"),
                      InstanceMethod<&NativeModel::initialize>("initialize"),
                      InstanceMethod<&NativeModel::collect>("collect"),
                      InstanceMethod<&NativeModel::generate>("generate"),
                      InstanceMethod<&NativeModel::mergedWeight>("mergedWeight"),
                      InstanceMethod<&NativeModel::planMemory>("planMemory"),
                      InstanceMethod<&NativeModel::profile>("profile"),
                      InstanceMethod<&NativeModel::resetProfile>("resetProfile"),
                      InstanceMethod<&NativeModel::cancel>("cancel"),
                      InstanceMethod<&NativeModel::dispose>("dispose")});
}

template <class Work>
Napi::Value NativeModel::queue(const Napi::CallbackInfo& info, const Napi::Value& callback, Work work) {
  return state_->submit(info.Env(), info.This(), callback,
                        [work = std::move(work)](ModelState& state, uint64_t call) -> ResultMaker {
                          return work(*state.engine.model, state, call);
                        });
}

template <class Work>
Napi::Value NativeModel::onNewEngine(Napi::Env env, const Napi::Value& callback, Work work) {
  const Napi::Object object = env.GetInstanceData<AddonData>()->modelClass.New({});
  NativeModel* self = Unwrap(object);
  self->state_ = std::make_unique<ModelState>(env);
  return self->state_->submit(
      env, object, callback,
      [self, work = std::move(work)](ModelState& state, uint64_t call) -> ResultMaker { return work(self, state, call); });
}

template <class Work>
Napi::Value NativeModel::queue(const Napi::CallbackInfo& info, Work work) {
  return queue(info, info.Env().Undefined(),
               [work = std::move(work)](Decoder& model, ModelState&, uint64_t) -> ResultMaker { return work(model); });
}

Napi::Value NativeModel::load(const Napi::CallbackInfo& info) {
  const auto options = info[0].As<Napi::Object>();
  DecoderSpec spec = toSpec(options.Get("spec").As<Napi::Object>());
  std::vector<TensorSource> tensors = toTensors(options.Get("tensors").As<Napi::Array>());
  DeviceOptions asked;
  asked.device = text(options, "device");
  asked.threads = static_cast<int>(integer(options, "threads"));
  asked.copyBudget = copyBudget(number(options, "copyBudget"));
  asked.prepack = options.Get("prepack").ToBoolean();
  asked.profile = options.Get("profile").ToBoolean();

  return onNewEngine(
      info.Env(), info[1],
      [spec = std::move(spec), tensors = std::move(tensors), asked, dtype = text(options, "dtype")](
          NativeModel* self, ModelState& state, uint64_t call) -> ResultMaker {
        const DeviceChoice choice = chooseDevice(asked.device);
        DeviceOptions options = asked;
        options.computeType = dtype == "bfloat16" || (dtype == "auto" && choice.bfloat16) ? DType::bf16 : DType::f32;
        state.engine.model =
            std::make_unique<Decoder>(spec, tensors, makeDevice(choice, options), [&](int64_t done, int64_t total) {
              state.notify(call, [done, total](Napi::Env env) -> std::vector<napi_value> {
                return {toNumber(env, done), toNumber(env, total)};
              });
            });
        Decoder& model = *state.engine.model;
        return [self, choice, options, name = model.device().name(), parameters = model.parameters(),
                weightBytes = static_cast<int64_t>(model.weightBytes())](Napi::Env env) -> Napi::Value {
          auto description = Napi::Object::New(env);
          description.Set("device", choice.device);
          description.Set("deviceName", name);
          description.Set("deviceNote", choice.note);
          description.Set("dtype", nameOf(options.computeType));
          description.Set("threads", choice.device != "cpu" ? 0 : options.threads > 0 ? options.threads : physicalCores());
          description.Set("parameters", toNumber(env, parameters));
          description.Set("weightBytes", toNumber(env, weightBytes));
          self->info_ = Napi::Persistent(description);
          return self->Value();
        };
      });
}

Napi::Value NativeModel::devices(const Napi::CallbackInfo& info) {
  return onNewEngine(info.Env(), info.Env().Undefined(), [](NativeModel*, ModelState&, uint64_t) -> ResultMaker {
    return [report = describeDevices()](Napi::Env env) -> Napi::Value { return fromDevices(env, report); };
  });
}

Napi::Value NativeModel::info(const Napi::CallbackInfo&) {
  return info_.Value();
}

Napi::Value NativeModel::addLora(const Napi::CallbackInfo& info) {
  const auto options = info[0].As<Napi::Object>();
  return queue(info, [modules = toStrings(options.Get("modules").As<Napi::Array>()), rank = integer(options, "rank"),
                      scaling = static_cast<float>(number(options, "scaling"))](Decoder& model) {
    model.addLora(modules, rank, scaling);
    return undefined();
  });
}

Napi::Value NativeModel::removeLora(const Napi::CallbackInfo& info) {
  return queue(info, [](Decoder& model) {
    model.removeLora();
    return undefined();
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
  return queue(info, [](Decoder& model) {
    auto factors = adaptersOf(model).read(model.device(), LoraSet::Array::value);
    return [factors = std::move(factors)](Napi::Env env) -> Napi::Value {
      auto array = Napi::Array::New(env);
      fromFactors(env, array, factors, factorKeys);
      return array;
    };
  });
}

Napi::Value NativeModel::writeFactors(const Napi::CallbackInfo& info) {
  return queue(info, [factors = toFactors(info[0].As<Napi::Array>(), factorKeys)](Decoder& model) {
    adaptersOf(model).write(model.device(), LoraSet::Array::value, factors);
    return undefined();
  });
}

Napi::Value NativeModel::readMoments(const Napi::CallbackInfo& info) {
  return queue(info, [](Decoder& model) {
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
  return queue(info, [first = toFactors(array, firstKeys), second = toFactors(array, secondKeys)](Decoder& model) {
    adaptersOf(model).write(model.device(), LoraSet::Array::firstMoment, first);
    adaptersOf(model).write(model.device(), LoraSet::Array::secondMoment, second);
    return undefined();
  });
}

Napi::Value NativeModel::trainStep(const Napi::CallbackInfo& info) {
  return queue(info, [batches = toBatches(info[0].As<Napi::Array>()),
                      options = toStepOptions(info[1].As<Napi::Object>())](Decoder& model) {
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
  return queue(info, [batch = toBatch(info[0].As<Napi::Object>())](Decoder& model) {
    return [result = model.evaluate(batch)](Napi::Env env) -> Napi::Value {
      auto object = Napi::Object::New(env);
      object.Set("losses", typedArray<Napi::Float64Array>(env, result.losses));
      object.Set("labelTokens", typedArray<Napi::Int32Array>(env, result.labelTokens));
      return object;
    };
  });
}

Napi::Value NativeModel::logits(const Napi::CallbackInfo& info) {
  return queue(info, [batch = toBatch(info[0].As<Napi::Object>())](Decoder& model) {
    return [logits = model.logits(batch)](Napi::Env env) -> Napi::Value { return typedArray<Napi::Float32Array>(env, logits); };
  });
}

Napi::Value NativeModel::planInitialization(const Napi::CallbackInfo& info) {
  return queue(info, [batches = toBatches(info[0].As<Napi::Array>()),
                      initialization = toInitialization(info[1].As<Napi::Object>())](Decoder& model) {
    return [plan = lora_da::planInitialization(model, batches, initialization)](Napi::Env env) { return fromPlan(env, plan); };
  });
}

Napi::Value NativeModel::initialize(const Napi::CallbackInfo& info) {
  return queue(info, info[2],
               [batches = toBatches(info[0].As<Napi::Array>()), initialization = toInitialization(info[1].As<Napi::Object>())](
                   Decoder& model, ModelState& state, uint64_t call) -> ResultMaker {
                 const auto progress = [&](InitializationPhase phase, int64_t done, int64_t total) {
                   if (model.cancelled.load()) throw Error(code::aborted, "the operation was aborted");
                   state.notify(call, [phase, done, total](Napi::Env env) -> std::vector<napi_value> {
                     return {Napi::String::New(env, nameOf(phase)), toNumber(env, done), toNumber(env, total)};
                   });
                 };
                 return [result = initializeAdapters(model, batches, initialization, progress)](Napi::Env env) -> Napi::Value {
                   return fromReport(env, result);
                 };
               });
}

Napi::Value NativeModel::collect(const Napi::CallbackInfo& info) {
  struct ModuleStatistics {
    std::string module;
    std::vector<float> gradient;
    std::vector<double> inputMoment, outputFactor;
  };
  return queue(
      info, [batches = toBatches(info[0].As<Napi::Array>()), mask = toTokenMask(info[1].ToString().Utf8Value())](Decoder& model) {
        Statistics statistics = collectStatistics(model, batches, {true, true, true}, mask, [](auto...) {});
        std::vector<ModuleStatistics> modules;
        for (size_t i = 0; i < model.projections().size(); ++i) {
          if (model.lora() && !model.lora()->group(i)) continue;
          const GroupStatistics group = statistics.take(i);
          const Projection& projection = *model.projections()[i];
          auto* moment = static_cast<double*>(group.inputMoment.get());
          std::vector<float> gradient(static_cast<size_t>(projection.out * projection.in));
          std::vector<double> inputMoment(static_cast<size_t>(projection.in * projection.in));
          model.device().mirrorLower(moment, projection.in);
          model.device().download(gradient.data(), group.gradient.get(), gradient.size() * sizeof(float));
          model.device().download(inputMoment.data(), moment, inputMoment.size() * sizeof(double));
          model.device().synchronize();
          for (const ProjectionPart& part : projection.parts) {
            const auto rows = gradient.begin() + part.offset * projection.in;
            modules.push_back({part.module,
                               {rows, rows + part.out * projection.in},
                               inputMoment,
                               {group.outputFactor.begin() + part.offset, group.outputFactor.begin() + part.offset + part.out}});
          }
        }
        return [modules = std::move(modules)](Napi::Env env) -> Napi::Value {
          auto array = Napi::Array::New(env, modules.size());
          for (uint32_t i = 0; i < modules.size(); ++i) {
            auto object = Napi::Object::New(env);
            object.Set("module", modules[i].module);
            object.Set("gradient", typedArray<Napi::Float32Array>(env, modules[i].gradient));
            object.Set("inputMoment", typedArray<Napi::Float64Array>(env, modules[i].inputMoment));
            object.Set("outputFactor", typedArray<Napi::Float64Array>(env, modules[i].outputFactor));
            array.Set(i, object);
          }
          return array;
        };
      });
}

Napi::Value NativeModel::generate(const Napi::CallbackInfo& info) {
  return queue(
      info, info[1],
      [options = toGenerateOptions(info[0].As<Napi::Object>())](Decoder& model, ModelState& state, uint64_t call) -> ResultMaker {
        auto ids = model.generate(options, [&](int32_t id) {
          state.notify(call, [id](Napi::Env env) -> std::vector<napi_value> { return {toNumber(env, id)}; });
        });
        return [ids = std::move(ids)](Napi::Env env) -> Napi::Value { return typedArray<Napi::Int32Array>(env, ids); };
      });
}

Napi::Value NativeModel::mergedWeight(const Napi::CallbackInfo& info) {
  return queue(info, [module = info[0].ToString().Utf8Value()](Decoder& model) {
    return [merged = model.mergedWeight(module)](Napi::Env env) -> Napi::Value {
      return typedArray<Napi::Float32Array>(env, merged);
    };
  });
}

Napi::Value NativeModel::planMemory(const Napi::CallbackInfo& info) {
  const int64_t tokens = info[0].ToNumber().Int64Value(), labels = info[1].ToNumber().Int64Value();
  const int64_t maxLength = info[2].ToNumber().Int64Value();
  return queue(info, [tokens, labels, maxLength, recompute = toRecompute(info[3].ToString().Utf8Value())](Decoder& model) {
    return [plan = model.planMemory(tokens, labels, maxLength, recompute),
            free = model.device().memory().free](Napi::Env env) -> Napi::Value {
      auto object = Napi::Object::New(env);
      object.Set("weights", static_cast<double>(plan.weights));
      object.Set("activations", static_cast<double>(plan.activations));
      object.Set("adapters", static_cast<double>(plan.adapters));
      object.Set("workspace", static_cast<double>(plan.workspace));
      object.Set("free", static_cast<double>(free));
      return object;
    };
  });
}

namespace {

ProfiledDevice& profiledDeviceOf(Decoder& model) {
  auto* device = dynamic_cast<ProfiledDevice*>(&model.device());
  if (!device) throw Error(code::invalidArgument, "the model was not loaded with the option profile");
  return *device;
}

}  // namespace

Napi::Value NativeModel::profile(const Napi::CallbackInfo& info) {
  return queue(info, [](Decoder& model) {
    return [operations = profiledDeviceOf(model).profile()](Napi::Env env) -> Napi::Value {
      auto array = Napi::Array::New(env, operations.size());
      for (uint32_t i = 0; i < operations.size(); ++i) {
        auto object = Napi::Object::New(env);
        object.Set("operation", operations[i].operation);
        object.Set("calls", toNumber(env, operations[i].calls));
        object.Set("seconds", operations[i].seconds);
        object.Set("flops", operations[i].flops);
        object.Set("bytes", operations[i].bytes);
        array.Set(i, object);
      }
      return array;
    };
  });
}

Napi::Value NativeModel::resetProfile(const Napi::CallbackInfo& info) {
  return queue(info, [](Decoder& model) {
    profiledDeviceOf(model).reset();
    return undefined();
  });
}

Napi::Value NativeModel::cancel(const Napi::CallbackInfo& info) {
  if (!state_->disposed) state_->engine.cancel();
  return info.Env().Undefined();
}

Napi::Value NativeModel::dispose(const Napi::CallbackInfo& info) {
  if (state_->disposed) {
    const auto deferred = Napi::Promise::Deferred::New(info.Env());
    deferred.Resolve(info.Env().Undefined());
    return deferred.Promise();
  }
  state_->engine.cancel();
  const Napi::Value freed = state_->submit(info.Env(), info.This(), info.Env().Undefined(), [](ModelState& state, uint64_t) {
    state.engine.release();
    return undefined();
  });
  state_->disposed = true;
  return freed;
}

}  // namespace lora_da::bindings
