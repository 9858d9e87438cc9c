// Matrix products through oneDNN. A primitive is made once per shape, types and layout, and kept.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>

#include "core/device.h"
#include "cpu/onednn.h"

namespace lora_da::cpu {

// How the right operand [K, N] of a product is laid out.
enum class Layout : uint8_t { rowMajor, transposed, packed };

struct ProductKey {
  int64_t m, n, k;
  DType inputs, output;
  bool leftTransposed;
  Layout right;
  bool accumulate;
  bool bias;
  float alpha;
  int64_t leftStride, rightStride, outputStride;

  bool operator==(const ProductKey& other) const;
};

struct ProductKeyHash {
  size_t operator()(const ProductKey& key) const;
};

class Products {
 public:
  // `scratch` gives working memory that lives until the next call.
  explicit Products(std::function<void*(size_t)> scratch);
  ~Products();

  // c [m, n] = alpha * a b (+ bias) (+ c). Pointers are to the first element; layouts are in the key.
  void run(const ProductKey& key, const void* a, const void* b, const float* bias, void* c);

  // Copies the right operand [k, n] (given row-major or transposed) into the layout that oneDNN prefers for it.
  size_t packedBytes(int64_t k, int64_t n, DType type);
  void pack(int64_t k, int64_t n, DType type, const void* source, Layout sourceLayout, void* packed);

 private:
  struct Entry;
  Entry& entry(const ProductKey& key);
  dnnl::memory::desc packedDescription(int64_t k, int64_t n, DType type);

  dnnl::engine engine_;
  dnnl::stream stream_;
  std::function<void*(size_t)> scratch_;
  std::unordered_map<ProductKey, std::unique_ptr<Entry>, ProductKeyHash> entries_;
};

}  // namespace lora_da::cpu
