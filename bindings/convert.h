// Between JavaScript values and the core's structs. lib/ has checked types and ranges already.
#pragma once

#include <napi.h>

#include <string>
#include <vector>

#include "core/device_plugin.h"
#include "init/adapter_initialization.h"
#include "model/decoder.h"

namespace lora_da::bindings {

double number(const Napi::Object& object, const char* key);
int64_t integer(const Napi::Object& object, const char* key);
bool boolean(const Napi::Object& object, const char* key);
std::string text(const Napi::Object& object, const char* key);

DecoderSpec toSpec(const Napi::Object& object);
std::vector<TensorSource> toTensors(const Napi::Array& array);
TokenBatch toBatch(const Napi::Object& object);
std::vector<TokenBatch> toBatches(const Napi::Array& array);
std::vector<std::string> toStrings(const Napi::Array& array);
std::vector<int32_t> toInts(const Napi::Value& value);
StepOptions toStepOptions(const Napi::Object& object);
Recompute toRecompute(const std::string& name);
GenerateOptions toGenerateOptions(const Napi::Object& object);
TokenMask toTokenMask(const std::string& name);
AdapterInitialization toInitialization(const Napi::Object& object);

// {module, [aKey], [bKey]} objects and back; `first` is {"a", "b"} for factors, {"aFirst", "bFirst"}... for moments.
struct FactorKeys {
  const char* a;
  const char* b;
};
std::vector<AdapterFactors> toFactors(const Napi::Array& array, FactorKeys keys);
void fromFactors(Napi::Env env, Napi::Array& target, const std::vector<AdapterFactors>& factors, FactorKeys keys);

Napi::Value fromPlan(Napi::Env env, const std::optional<CollectionPlan>& plan);
Napi::Value fromDevices(Napi::Env env, const DeviceReport& report);
Napi::Value fromReport(Napi::Env env, const AdapterInitializationResult& result);

template <class Array, class T>
Array typedArray(Napi::Env env, const std::vector<T>& values) {
  Array array = Array::New(env, values.size());
  std::copy(values.begin(), values.end(), array.Data());
  return array;
}

}  // namespace lora_da::bindings
