#include "model/lora.h"

#include <map>

#include "core/error.h"

namespace lora_da {

LoraSet::LoraSet(Device& device, const std::vector<LoraGroupShape>& shapes, int64_t rank, float scaling)
    : rank_(rank), scaling_(scaling) {
  for (const LoraGroupShape& shape : shapes) {
    LoraGroup group;
    group.blocks = shape.blocks;
    group.in = shape.in;
    group.out = shape.out;
    group.k = static_cast<int64_t>(shape.blocks.size()) * rank;
    group.scaling = scaling;
    group.aOffset = count_;
    count_ += group.k * group.in;
    group.upOffset = count_;
    count_ += group.blocks.empty() ? 0 : rank * group.out;
    groups_.push_back(std::move(group));
  }
  const auto elements = static_cast<size_t>(count_);
  const bool shadowed = device.computeType() != DType::f32;
  const auto allocate = [&](const char* purpose, size_t elementBytes) {
    Buffer buffer = device.allocate(elements * elementBytes, purpose);
    device.zero(buffer.get(), elements * elementBytes);
    bytes_ += elements * elementBytes;
    return buffer;
  };
  values_ = allocate("adapter factors", sizeof(float));
  gradients_ = allocate("adapter gradients", sizeof(float));
  firstMoments_ = allocate("adapter first moments", sizeof(float));
  secondMoments_ = allocate("adapter second moments", sizeof(float));
  if (shadowed) shadows_ = allocate("adapter factors for products", sizeOf(device.computeType()));

  char* products = static_cast<char*>(shadowed ? shadows_.get() : values_.get());
  const auto width = static_cast<int64_t>(sizeOf(device.computeType()));
  auto* gradients = static_cast<float*>(gradients_.get());
  for (LoraGroup& group : groups_) {
    group.a = {products + group.aOffset * width, device.computeType(), group.k, group.in, group.in};
    group.up.factors = {products + group.upOffset * width, device.computeType(), rank, group.out, group.out};
    for (const LoraBlock& block : group.blocks) group.up.blocks.push_back({block.offset, block.out});
    group.aGrad = {gradients + group.aOffset, DType::f32, group.k, group.in, group.in};
    group.upGrad = {gradients + group.upOffset, DType::f32, rank, group.out, group.out};
  }
}

std::vector<Parameter> LoraSet::parameters() const {
  return {{static_cast<float*>(values_.get()), static_cast<float*>(gradients_.get()), static_cast<float*>(firstMoments_.get()),
           static_cast<float*>(secondMoments_.get()), shadows_.get(), count_}};
}

void LoraSet::zeroGradients(Device& device) const {
  device.zero(gradients_.get(), static_cast<size_t>(count_) * sizeof(float));
}

float* LoraSet::pointer(Array array) const {
  const Buffer& buffer = array == Array::value ? values_ : array == Array::firstMoment ? firstMoments_ : secondMoments_;
  return static_cast<float*>(buffer.get());
}

AdapterFactors LoraSet::unpack(const LoraGroup& group, size_t block, const float* a, const float* up) const {
  const LoraBlock& module = group.blocks[block];
  AdapterFactors factors{module.module, module.out, group.in, rank_, {}, {}};
  const int64_t firstRow = static_cast<int64_t>(block) * rank_;
  factors.a.assign(a + firstRow * group.in, a + (firstRow + rank_) * group.in);
  factors.b.resize(static_cast<size_t>(module.out * rank_));
  for (int64_t r = 0; r < rank_; ++r) {
    const float* row = up + r * group.out + module.offset;
    for (int64_t o = 0; o < module.out; ++o) factors.b[static_cast<size_t>(o * rank_ + r)] = row[o];
  }
  return factors;
}

std::vector<float> LoraSet::download(Device& device, Array array, const LoraGroup& group) const {
  std::vector<float> host(static_cast<size_t>(group.k * group.in + rank_ * group.out));
  device.download(host.data(), pointer(array) + group.aOffset, host.size() * sizeof(float));
  device.synchronize();
  return host;
}

std::vector<AdapterFactors> LoraSet::read(Device& device, Array array) const {
  std::vector<AdapterFactors> result;
  for (const LoraGroup& group : groups_) {
    if (group.blocks.empty()) continue;
    const std::vector<float> host = download(device, array, group);
    for (size_t block = 0; block < group.blocks.size(); ++block) {
      result.push_back(unpack(group, block, host.data(), host.data() + group.k * group.in));
    }
  }
  return result;
}

AdapterFactors LoraSet::readModule(Device& device, const std::string& module) const {
  for (const LoraGroup& group : groups_) {
    for (size_t block = 0; block < group.blocks.size(); ++block) {
      if (group.blocks[block].module != module) continue;
      const std::vector<float> host = download(device, Array::value, group);
      return unpack(group, block, host.data(), host.data() + group.k * group.in);
    }
  }
  throw Error(code::invalidArgument, "module " + module + " has no adapter");
}

void LoraSet::write(Device& device, Array array, const std::vector<AdapterFactors>& factors) {
  std::map<std::string, const AdapterFactors*> byModule;
  for (const AdapterFactors& entry : factors) byModule[entry.module] = &entry;
  std::vector<float> host(static_cast<size_t>(count_), 0.0f);
  size_t written = 0;
  for (const LoraGroup& group : groups_) {
    for (size_t block = 0; block < group.blocks.size(); ++block) {
      const LoraBlock& module = group.blocks[block];
      const auto found = byModule.find(module.module);
      if (found == byModule.end()) throw Error(code::invalidTensor, "no factors for module " + module.module);
      const AdapterFactors& entry = *found->second;
      if (entry.a.size() != static_cast<size_t>(rank_ * group.in) || entry.b.size() != static_cast<size_t>(module.out * rank_)) {
        throw Error(code::invalidTensor,
                    "factors of module " + module.module + " do not have the shapes of rank " + std::to_string(rank_));
      }
      const int64_t firstRow = static_cast<int64_t>(block) * rank_;
      std::copy(entry.a.begin(), entry.a.end(), host.begin() + group.aOffset + firstRow * group.in);
      for (int64_t r = 0; r < rank_; ++r) {
        float* up = host.data() + group.upOffset + r * group.out + module.offset;
        for (int64_t o = 0; o < module.out; ++o) up[o] = entry.b[static_cast<size_t>(o * rank_ + r)];
      }
      ++written;
    }
  }
  if (written != byModule.size()) throw Error(code::invalidTensor, "factors given for modules that have no adapter");
  device.upload(pointer(array), host.data(), host.size() * sizeof(float));
  if (array == Array::value && shadows_) {
    device.convert({values_.get(), DType::f32, 1, count_, count_}, {shadows_.get(), device.computeType(), 1, count_, count_});
  }
}

}  // namespace lora_da
