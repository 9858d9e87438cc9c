#include "cpu/products.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "core/error.h"
#include "cpu/cpu_device.h"

namespace lora_da::cpu {

namespace {

using dnnl::memory;

// The row count that packed layouts are chosen for. oneDNN's blocked layouts depend on K and N; its products accept them for any
// row count, one row (decoding) included.
constexpr int64_t typicalRows = 512;

// Products with at most so many columns or rows go to the own kernels for thin factors, where there are any.
constexpr int64_t thinWidth = 192;

memory::data_type typeOf(DType type) {
  return type == DType::bf16 ? memory::data_type::bf16 : memory::data_type::f32;
}

memory::desc rowMajor(int64_t rows, int64_t cols, int64_t stride, DType type) {
  return memory::desc({rows, cols}, typeOf(type), memory::dims{stride, 1});
}

memory::desc columnMajor(int64_t rows, int64_t cols, int64_t stride, DType type) {
  return memory::desc({rows, cols}, typeOf(type), memory::dims{1, stride});
}

dnnl::primitive_attr attributes(bool accumulate, float alpha) {
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  dnnl::post_ops ops;
  if (alpha != 1.0f) appendScale(ops, alpha);
  if (accumulate) ops.append_sum(1.0f);
  attr.set_post_ops(ops);
  return attr;
}

}  // namespace

bool ProductKey::operator==(const ProductKey& other) const {
  const auto fields = [](const ProductKey& k) {
    return std::tie(k.m, k.n, k.k, k.inputs, k.output, k.leftTransposed, k.right, k.accumulate, k.bias, k.alpha, k.leftStride,
                    k.rightStride, k.outputStride);
  };
  return fields(*this) == fields(other);
}

size_t ProductKeyHash::operator()(const ProductKey& key) const {
  size_t hash = 0;
  const auto mix = [&hash](uint64_t value) { hash = (hash ^ value) * 0x9e3779b97f4a7c15u + (hash >> 29); };
  mix(static_cast<uint64_t>(key.m));
  mix(static_cast<uint64_t>(key.n));
  mix(static_cast<uint64_t>(key.k));
  mix(static_cast<uint64_t>(key.inputs) | static_cast<uint64_t>(key.output) << 4 |
      static_cast<uint64_t>(key.leftTransposed) << 8 | static_cast<uint64_t>(key.right) << 9 |
      static_cast<uint64_t>(key.accumulate) << 12 | static_cast<uint64_t>(key.bias) << 13);
  return hash;
}

struct Products::Entry {
  dnnl::matmul primitive;
  size_t scratchBytes = 0;
  std::unordered_map<int, memory> arguments;
};

Products::Products(std::function<void*(size_t)> scratch)
    : engine_(dnnl::engine::kind::cpu, 0), stream_(engine_), scratch_(std::move(scratch)) {}

Products::~Products() = default;

memory::desc Products::packedDescription(int64_t k, int64_t n, DType type) {
  const auto weights = memory::desc({k, n}, typeOf(type), memory::format_tag::any);
  return matmulDescription(engine_, rowMajor(typicalRows, k, k, type), weights, nullptr, rowMajor(typicalRows, n, n, type),
                           attributes(false, 1.0f))
      .weights_desc();
}

size_t Products::packedBytes(int64_t k, int64_t n, DType type) {
  return packedDescription(k, n, type).get_size();
}

void Products::pack(int64_t k, int64_t n, DType type, const void* source, Layout sourceLayout, void* packed) {
  const auto from = sourceLayout == Layout::rowMajor ? rowMajor(k, n, n, type) : columnMajor(k, n, k, type);
  memory input(from, engine_, const_cast<void*>(source));
  memory output(packedDescription(k, n, type), engine_, packed);
  dnnl::reorder(input, output).execute(stream_, input, output);
  stream_.wait();
}

Products::Entry& Products::entry(const ProductKey& key) {
  auto& slot = entries_[key];
  if (slot) return *slot;
  const auto left = key.leftTransposed ? columnMajor(key.m, key.k, key.leftStride, key.inputs)
                                       : rowMajor(key.m, key.k, key.leftStride, key.inputs);
  const auto right = key.right == Layout::packed       ? packedDescription(key.k, key.n, key.inputs)
                     : key.right == Layout::transposed ? columnMajor(key.k, key.n, key.rightStride, key.inputs)
                                                       : rowMajor(key.k, key.n, key.rightStride, key.inputs);
  const auto output = rowMajor(key.m, key.n, key.outputStride, key.output);
  const auto bias = memory::desc({1, key.n}, memory::data_type::f32, memory::dims{key.n, 1});
  const auto description =
      matmulDescription(engine_, left, right, key.bias ? &bias : nullptr, output, attributes(key.accumulate, key.alpha));
  slot = std::make_unique<Entry>();
  slot->primitive = dnnl::matmul(description);
  slot->scratchBytes = description.scratchpad_desc().get_size();
  auto& arguments = slot->arguments;
  arguments.emplace(DNNL_ARG_SRC, memory(left, engine_, nullptr));
  arguments.emplace(DNNL_ARG_WEIGHTS, memory(right, engine_, nullptr));
  arguments.emplace(DNNL_ARG_DST, memory(output, engine_, nullptr));
  arguments.emplace(DNNL_ARG_SCRATCHPAD, memory(description.scratchpad_desc(), engine_, nullptr));
  if (key.bias) arguments.emplace(DNNL_ARG_BIAS, memory(bias, engine_, nullptr));
  return *slot;
}

void Products::run(const ProductKey& key, const void* a, const void* b, const float* bias, void* c) {
  Entry& product = entry(key);
  auto& arguments = product.arguments;
  arguments.at(DNNL_ARG_SRC).set_data_handle(const_cast<void*>(a));
  arguments.at(DNNL_ARG_WEIGHTS).set_data_handle(const_cast<void*>(b));
  arguments.at(DNNL_ARG_DST).set_data_handle(c);
  if (product.scratchBytes) arguments.at(DNNL_ARG_SCRATCHPAD).set_data_handle(scratch_(product.scratchBytes));
  if (bias) arguments.at(DNNL_ARG_BIAS).set_data_handle(const_cast<float*>(bias));
  product.primitive.execute(stream_, arguments);
  stream_.wait();
}

void CpuDevice::matmul(Transpose ta, const Matrix& a, Transpose tb, const Matrix& b, float alpha, bool accumulate,
                       const Matrix& c) {
  const int64_t m = c.rows, n = c.cols, k = ta == Transpose::yes ? a.rows : a.cols;
  if (a.dtype == DType::f64) return denseProduct(ta, a, tb, b, alpha, accumulate, c);
  if (hasPanels() && a.dtype == computeType_ && b.dtype == computeType_) {
    // LoRA's factors: few columns, or a sum over the tokens with few rows.
    if (ta == Transpose::no && tb == Transpose::yes && !accumulate && n <= thinWidth) return thinProduct(a, b, alpha, c);
    if (ta == Transpose::yes && tb == Transpose::no && accumulate && m <= thinWidth && alpha == 1.0f && c.dtype == DType::f32) {
      return outerSum(a, b, c);
    }
  }
  if (c.stride != n && m > 1) return productIntoSlice(ta, a, tb, b, alpha, accumulate, c);
  const ProductKey key{m,
                       n,
                       k,
                       a.dtype,
                       c.dtype,
                       ta == Transpose::yes,
                       tb == Transpose::yes ? Layout::transposed : Layout::rowMajor,
                       accumulate,
                       false,
                       alpha,
                       a.stride,
                       b.stride,
                       c.stride};
  products_->run(key, a.data, b.data, nullptr, c.data);
}

// oneDNN 2.6 has only its unoptimized reference loops for results whose rows lie apart.
void CpuDevice::productIntoSlice(Transpose ta, const Matrix& a, Transpose tb, const Matrix& b, float alpha, bool accumulate,
                                 const Matrix& c) {
  const size_t bytes = static_cast<size_t>(c.rows * c.cols) * sizeOf(c.dtype);
  const Matrix whole{sliceScratch_.reserve(*this, bytes, "a slice of a product"), c.dtype, c.rows, c.cols, c.cols};
  if (accumulate) convert(c, whole);
  matmul(ta, a, tb, b, alpha, accumulate, whole);
  convert(whole, c);
}

}  // namespace lora_da::cpu
