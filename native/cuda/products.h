// Matrix products on cuBLASLt. Its matrices are column-major, ours row-major: it sees each array transposed, so that
// d = op(a) op(b) is asked for as d^T = op(b)^T op(a)^T, which costs nothing. Accumulation is float32, float64 for float64.
#pragma once

#include <cublasLt.h>

#include <array>
#include <memory>
#include <unordered_map>

#include "core/device.h"
#include "cuda/queue.h"

namespace lora_da::cuda {

// d [m, n] = alpha op(a) op(b) + added + bias, rounded once.
struct Product {
  Transpose transposeA = Transpose::no;
  Matrix a;
  Transpose transposeB = Transpose::no;
  Matrix b;
  float alpha = 1;
  const Matrix* added = nullptr;  // [m, n] in d's type, d itself where the product accumulates; null: nothing
  const void* bias = nullptr;     // [n] in d's type; null: none
  Matrix d;
};

class Products {
 public:
  explicit Products(Queue& queue);
  ~Products();
  Products(const Products&) = delete;

  void multiply(const Product& product);

  // Searches for an algorithm so far, for tests: one for each kind of product.
  size_t searches() const { return plans_.size(); }

 private:
  // What an algorithm is chosen by: sizes, types, strides and alignments; a row of numbers, so that it hashes plainly.
  using Key = std::array<int64_t, 14>;
  struct KeyHash {
    size_t operator()(const Key& key) const;
  };
  struct Plan;

  static Key keyOf(const Product& product);
  Plan& planFor(const Product& product, const Key& key);
  void choose(const Product& product, Plan& plan) const;
  void run(const Product& product, Plan& plan);

  // Recommended for sm_90 and later (cuBLAS documentation, "cublasSetWorkspace"); one stream needs one.
  static constexpr size_t workspaceBytes = size_t{32} << 20;

  Queue& queue_;
  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  std::unordered_map<Key, std::unique_ptr<Plan>, KeyHash> plans_;
};

}  // namespace lora_da::cuda
