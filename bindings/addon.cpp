// The module that require() returns.
#include <cblas.h>
#include <napi.h>

#include <string>

#include "core/cpu_info.h"
#include "cpu/kernels/kernels.h"
#include "cpu/onednn.h"
#include "init/initializer.h"
#include "native_model.h"

namespace lora_da::bindings {

namespace {

Napi::Value info(const Napi::CallbackInfo& call) {
  const Napi::Env env = call.Env();
  auto libraries = Napi::Object::New(env);
  const dnnl_version_t* version = dnnl_version();
  libraries.Set("oneDNN",
                std::to_string(version->major) + "." + std::to_string(version->minor) + "." + std::to_string(version->patch));
  libraries.Set("OpenBLAS", openblas_get_config());

  auto table = Napi::Array::New(env);
  uint32_t row = 0;
  for (const Initializer& initializer : initializers()) {
    auto entry = Napi::Object::New(env);
    entry.Set("name", initializer.name);
    entry.Set("gradient", initializer.needs.gradient);
    entry.Set("inputMoment", initializer.needs.inputMoment);
    entry.Set("outputFactor", initializer.needs.outputFactor);
    table.Set(row++, entry);
  }

  auto result = Napi::Object::New(env);
  result.Set("isa", cpu::kernels().isa);
  result.Set("threads", physicalCores());
  result.Set("bfloat16", hasBfloat16Products());
  result.Set("libraries", libraries);
  result.Set("initializations", table);
  return result;
}

Napi::Value setErrorClass(const Napi::CallbackInfo& call) {
  call.Env().GetInstanceData<AddonData>()->errorClass = Napi::Persistent(call[0].As<Napi::Function>());
  return call.Env().Undefined();
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* data = new AddonData;
  data->modelClass = Napi::Persistent(NativeModel::define(env));
  env.SetInstanceData(data);
  exports.Set("loadModel", Napi::Function::New(env, NativeModel::load));
  exports.Set("devices", Napi::Function::New(env, NativeModel::devices));
  exports.Set("info", Napi::Function::New(env, info));
  exports.Set("setErrorClass", Napi::Function::New(env, setErrorClass));
  return exports;
}

}  // namespace

}  // namespace lora_da::bindings

static Napi::Object initializeAddon(Napi::Env env, Napi::Object exports) {
  return lora_da::bindings::init(env, exports);
}

NODE_API_MODULE(lora_da, initializeAddon)
