#include "convert.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace lora_da::bindings {

double number(const Napi::Object& object, const char* key) {
  return object.Get(key).ToNumber().DoubleValue();
}
int64_t integer(const Napi::Object& object, const char* key) {
  return object.Get(key).ToNumber().Int64Value();
}
bool boolean(const Napi::Object& object, const char* key) {
  return object.Get(key).ToBoolean().Value();
}
std::string text(const Napi::Object& object, const char* key) {
  return object.Get(key).ToString().Utf8Value();
}

namespace {

Napi::Object child(const Napi::Object& object, const char* key) {
  return object.Get(key).As<Napi::Object>();
}

LinearSpec toLinear(const Napi::Object& object) {
  return {text(object, "name"), integer(object, "out"), integer(object, "in"), boolean(object, "bias")};
}

std::vector<LinearSpec> toLinears(const Napi::Array& array) {
  std::vector<LinearSpec> linears;
  for (uint32_t i = 0; i < array.Length(); ++i) linears.push_back(toLinear(array.Get(i).As<Napi::Object>()));
  return linears;
}

template <class T>
std::vector<T> toNumbers(const Napi::Array& array) {
  std::vector<T> values;
  for (uint32_t i = 0; i < array.Length(); ++i) values.push_back(static_cast<T>(array.Get(i).ToNumber().DoubleValue()));
  return values;
}

Activation toActivation(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::geluTanh;
  if (name == "gelu") return Activation::gelu;
  throw Error(code::invalidArgument, "unknown activation " + name);
}

DType toFileType(const std::string& name) {
  if (name == "F32") return DType::f32;
  if (name == "F16") return DType::f16;
  if (name == "BF16") return DType::bf16;
  throw Error(code::invalidTensor, "unknown tensor type " + name);
}

std::vector<float> toFloats(const Napi::Value& value) {
  const auto array = value.As<Napi::Float32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

}  // namespace

DecoderSpec toSpec(const Napi::Object& object) {
  DecoderSpec spec;
  spec.vocabSize = integer(object, "vocabSize");
  spec.hiddenSize = integer(object, "hiddenSize");
  spec.intermediateSize = integer(object, "intermediateSize");
  spec.layers = integer(object, "layers");
  spec.heads = static_cast<int32_t>(integer(object, "heads"));
  spec.kvHeads = static_cast<int32_t>(integer(object, "kvHeads"));
  spec.headDim = static_cast<int32_t>(integer(object, "headDim"));
  spec.normEpsilon = static_cast<float>(number(object, "normEpsilon"));
  spec.normOffset = static_cast<float>(number(object, "normOffset"));
  spec.embeddingScale = static_cast<float>(number(object, "embeddingScale"));
  spec.activation = toActivation(text(object, "activation"));
  spec.headNorm = boolean(object, "headNorm");
  spec.attentionScale = static_cast<float>(number(object, "attentionScale"));
  spec.windows = toNumbers<int32_t>(object.Get("windows").As<Napi::Array>());
  spec.inverseFrequencies = toNumbers<float>(object.Get("inverseFrequencies").As<Napi::Array>());
  spec.rotaryScale = static_cast<float>(number(object, "rotaryScale"));
  spec.positionLimit = integer(object, "positionLimit");
  spec.tiedHead = boolean(object, "tiedHead");
  spec.attentionInputs = toLinears(object.Get("attentionInputs").As<Napi::Array>());
  spec.attentionOutput = toLinear(child(object, "attentionOutput"));
  spec.mlpInputs = toLinears(object.Get("mlpInputs").As<Napi::Array>());
  spec.mlpOutput = toLinear(child(object, "mlpOutput"));
  const Napi::Object names = child(object, "names");
  spec.names = {text(names, "embedding"), text(names, "layer"),   text(names, "attentionNorm"), text(names, "mlpNorm"),
                text(names, "queryNorm"), text(names, "keyNorm"), text(names, "finalNorm"),     text(names, "head")};
  return spec;
}

std::vector<TensorSource> toTensors(const Napi::Array& array) {
  std::vector<TensorSource> tensors;
  for (uint32_t i = 0; i < array.Length(); ++i) {
    const auto object = array.Get(i).As<Napi::Object>();
    TensorSource tensor;
    tensor.name = text(object, "name");
    tensor.file = text(object, "file");
    tensor.dtype = toFileType(text(object, "dtype"));
    tensor.shape = toNumbers<int64_t>(object.Get("shape").As<Napi::Array>());
    tensor.offset = static_cast<size_t>(integer(object, "offset"));
    tensor.bytes = static_cast<size_t>(integer(object, "bytes"));
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

std::vector<int32_t> toInts(const Napi::Value& value) {
  const auto array = value.As<Napi::Int32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

TokenBatch toBatch(const Napi::Object& object) {
  return {toInts(object.Get("inputIds")), toInts(object.Get("labels")), toInts(object.Get("sequenceStarts"))};
}

std::vector<TokenBatch> toBatches(const Napi::Array& array) {
  std::vector<TokenBatch> batches;
  for (uint32_t i = 0; i < array.Length(); ++i) batches.push_back(toBatch(array.Get(i).As<Napi::Object>()));
  return batches;
}

std::vector<std::string> toStrings(const Napi::Array& array) {
  std::vector<std::string> strings;
  for (uint32_t i = 0; i < array.Length(); ++i) strings.push_back(array.Get(i).ToString().Utf8Value());
  return strings;
}

Recompute toRecompute(const std::string& name) {
  return name == "layer" ? Recompute::layer : Recompute::none;
}

StepOptions toStepOptions(const Napi::Object& object) {
  StepOptions options;
  options.optimizer.learningRate = static_cast<float>(number(object, "learningRate"));
  options.optimizer.beta1 = static_cast<float>(number(object, "beta1"));
  options.optimizer.beta2 = static_cast<float>(number(object, "beta2"));
  options.optimizer.epsilon = static_cast<float>(number(object, "epsilon"));
  options.optimizer.weightDecay = static_cast<float>(number(object, "weightDecay"));
  options.optimizer.maxGradNorm = static_cast<float>(number(object, "maxGradNorm"));
  options.optimizer.step = integer(object, "step");
  options.recompute = toRecompute(text(object, "recompute"));
  return options;
}

GenerateOptions toGenerateOptions(const Napi::Object& object) {
  GenerateOptions options;
  options.inputIds = toInts(object.Get("inputIds"));
  options.maxNewTokens = integer(object, "maxNewTokens");
  options.temperature = number(object, "temperature");
  options.topP = number(object, "topP");
  options.seed = static_cast<uint64_t>(integer(object, "seed"));
  options.stopIds = toInts(object.Get("stopIds"));
  return options;
}

TokenMask toTokenMask(const std::string& name) {
  return name == "labels" ? TokenMask::labels : TokenMask::attention;
}

namespace {

std::optional<CollectionOrder> toOrder(const std::string& plan) {
  if (plan == nameOf(CollectionOrder::sampleMajor)) return CollectionOrder::sampleMajor;
  if (plan == nameOf(CollectionOrder::layerMajor)) return CollectionOrder::layerMajor;
  return std::nullopt;
}

}  // namespace

AdapterInitialization toInitialization(const Napi::Object& object) {
  AdapterInitialization initialization;
  initialization.method = text(object, "method");
  initialization.tokenMask = toTokenMask(text(object, "tokenMask"));
  initialization.collection = {toOrder(text(object, "plan")), static_cast<size_t>(number(object, "memoryBudget"))};
  InitializationOptions& options = initialization.options;
  options.damping = number(object, "damping");
  options.outputDamping = number(object, "outputDamping");
  options.varianceWeight = number(object, "varianceWeight");
  options.biasWeight = number(object, "biasWeight");
  options.gamma = number(object, "gamma");
  options.population = number(object, "population");
  options.normalizeDelta = boolean(object, "normalizeDelta");
  options.seed = static_cast<uint64_t>(integer(object, "seed"));
  return initialization;
}

std::vector<AdapterFactors> toFactors(const Napi::Array& array, FactorKeys keys) {
  std::vector<AdapterFactors> factors;
  for (uint32_t i = 0; i < array.Length(); ++i) {
    const auto object = array.Get(i).As<Napi::Object>();
    AdapterFactors entry;
    entry.module = text(object, "module");
    entry.a = toFloats(object.Get(keys.a));
    entry.b = toFloats(object.Get(keys.b));
    factors.push_back(std::move(entry));
  }
  return factors;
}

void fromFactors(Napi::Env env, Napi::Array& target, const std::vector<AdapterFactors>& factors, FactorKeys keys) {
  for (uint32_t i = 0; i < factors.size(); ++i) {
    auto object = i < target.Length() ? target.Get(i).As<Napi::Object>() : Napi::Object::New(env);
    object.Set("module", factors[i].module);
    object.Set(keys.a, typedArray<Napi::Float32Array>(env, factors[i].a));
    object.Set(keys.b, typedArray<Napi::Float32Array>(env, factors[i].b));
    target.Set(i, object);
  }
}

Napi::Value fromPlan(Napi::Env env, const std::optional<CollectionPlan>& found) {
  if (!found) return env.Null();
  const CollectionPlan& plan = *found;
  auto object = Napi::Object::New(env);
  object.Set("plan", nameOf(plan.order));
  object.Set("layersPerCheckpoint", static_cast<double>(plan.layersPerCheckpoint));
  const std::pair<const char*, size_t> sizes[] = {
      {"resident", plan.resident},       {"statistics", plan.statistics}, {"streams", plan.streams},
      {"activations", plan.activations}, {"workspace", plan.workspace},   {"total", plan.total()},
      {"budget", plan.budget},
  };
  for (const auto& [name, bytes] : sizes) object.Set(name, static_cast<double>(bytes));
  return object;
}

Napi::Value fromDevices(Napi::Env env, const DeviceReport& report) {
  auto devices = Napi::Array::New(env, report.devices.size());
  for (uint32_t i = 0; i < report.devices.size(); ++i) {
    const DeviceDescription& device = report.devices[i];
    auto object = Napi::Object::New(env);
    object.Set("name", device.name);
    object.Set("model", device.model);
    object.Set("usable", device.reason.empty());
    object.Set("reason", device.reason);
    object.Set("memory", static_cast<double>(device.memory));
    object.Set("computeCapability", device.computeCapability);
    object.Set("bfloat16", device.bfloat16);
    devices.Set(i, object);
  }
  auto libraries = Napi::Object::New(env);
  for (const auto& [name, version] : report.libraries) libraries.Set(name, version);
  auto result = Napi::Object::New(env);
  result.Set("devices", devices);
  result.Set("libraries", libraries);
  return result;
}

Napi::Value fromReport(Napi::Env env, const AdapterInitializationResult& result) {
  auto modules = Napi::Array::New(env, result.modules.size());
  for (uint32_t i = 0; i < result.modules.size(); ++i) {
    const ModuleReport& report = result.modules[i];
    auto object = Napi::Object::New(env);
    object.Set("module", report.module);
    object.Set("rank", static_cast<double>(result.rank));
    object.Set("conditionNumber", report.conditionNumber);
    object.Set("medianOutputOverDamping", report.medianOutputOverDamping);
    object.Set("sigma", report.sigma);
    object.Set("gap", report.gap);
    object.Set("relativeGap", report.relativeGap);
    object.Set("eigenvalues", typedArray<Napi::Float64Array>(env, report.eigenvalues));
    modules.Set(i, object);
  }
  auto object = Napi::Object::New(env);
  object.Set("modules", modules);
  object.Set("collection", fromPlan(env, result.plan));
  object.Set("collectSeconds", result.collectSeconds);
  object.Set("solveSeconds", result.solveSeconds);
  return object;
}

}  // namespace lora_da::bindings
