#include "cuda/products.h"

#include <algorithm>
#include <string>

#include "cuda/library_errors.h"

namespace lora_da::cuda {

namespace {

// An algorithm may rely on the alignment that it was chosen for; more than this none asks for.
constexpr int64_t mostAlignment = 256;

template <class T, cublasStatus_t (*destroy)(T)>
struct Destroyer {
  void operator()(T object) const { destroy(object); }
};
template <class T, cublasStatus_t (*destroy)(T)>
using Handle = std::unique_ptr<std::remove_pointer_t<T>, Destroyer<T, destroy>>;
using Layout = Handle<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Operation = Handle<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Preference = Handle<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

cudaDataType typeOf(DType type) {
  switch (type) {
    case DType::f64: return CUDA_R_64F;
    case DType::f32: return CUDA_R_32F;
    case DType::bf16: return CUDA_R_16BF;
    default: throw Error(code::internal, std::string("no matrix products in ") + nameOf(type));
  }
}

int64_t alignmentOf(const void* data) {
  const auto address = reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(mostAlignment);
  return static_cast<int64_t>(address & (~address + 1));
}

// A row-major matrix as the library's, which is its transpose.
Layout layoutOf(const Matrix& matrix) {
  cublasLtMatrixLayout_t layout = nullptr;
  check(cublasLtMatrixLayoutCreate(&layout, typeOf(matrix.dtype), static_cast<uint64_t>(matrix.cols),
                                   static_cast<uint64_t>(matrix.rows), matrix.stride),
        "describing a matrix");
  return Layout(layout);
}

template <class T>
void set(const Operation& operation, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check(cublasLtMatmulDescSetAttribute(operation.get(), attribute, &value, sizeof value), "describing a product");
}

template <class T>
void set(const Preference& preference, cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
  check(cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value), "limiting a product");
}

// float32 products are float32: TF32, which keeps 10 bits, has to be asked for and is not.
Operation describe(const Product& product) {
  const bool wide = product.d.dtype == DType::f64;
  cublasLtMatmulDesc_t description = nullptr;
  check(cublasLtMatmulDescCreate(&description, wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, wide ? CUDA_R_64F : CUDA_R_32F),
        "describing a product");
  Operation operation(description);
  const auto transposition = [](Transpose t) -> int32_t { return t == Transpose::no ? CUBLAS_OP_N : CUBLAS_OP_T; };
  set(operation, CUBLASLT_MATMUL_DESC_TRANSA, transposition(product.transposeB));
  set(operation, CUBLASLT_MATMUL_DESC_TRANSB, transposition(product.transposeA));
  if (product.bias) {
    set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<uint32_t>(CUBLASLT_EPILOGUE_BIAS));
    set(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias);
  }
  return operation;
}

const Matrix& addedTo(const Product& product) {
  return product.added ? *product.added : product.d;
}

std::string describeSizes(const Product& product) {
  const int64_t depth = product.transposeA == Transpose::no ? product.a.cols : product.a.rows;
  return std::to_string(product.d.rows) + " x " + std::to_string(product.d.cols) + " x " + std::to_string(depth) + " in " +
         nameOf(product.a.dtype);
}

}  // namespace

struct Products::Plan {
  Operation operation;
  Layout a, b, added, d;
  cublasLtMatmulAlgo_t algorithm{};
};

Products::Products(Queue& queue) : queue_(queue) {
  check(cublasLtCreate(&handle_), "starting cuBLASLt");
  check(cudaMalloc(&workspace_, workspaceBytes), "allocating the workspace of cuBLASLt");
}

Products::~Products() {
  plans_.clear();
  cudaStreamSynchronize(queue_.stream());  // products under way use the workspace
  cudaFree(workspace_);
  cublasLtDestroy(handle_);
}

size_t Products::KeyHash::operator()(const Key& key) const {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a, a word at a time
  for (const int64_t field : key) hash = (hash ^ static_cast<uint64_t>(field)) * 0x100000001b3u;
  return static_cast<size_t>(hash ^ (hash >> 32));
}

Products::Key Products::keyOf(const Product& product) {
  const Matrix& added = addedTo(product);
  const int64_t kinds = static_cast<int64_t>(product.transposeA == Transpose::yes) |
                        static_cast<int64_t>(product.transposeB == Transpose::yes) << 1 |
                        static_cast<int64_t>(product.bias != nullptr) << 2 | static_cast<int64_t>(product.added != nullptr) << 3 |
                        static_cast<int64_t>(product.a.dtype) << 8 | static_cast<int64_t>(product.d.dtype) << 16;
  return {kinds,
          product.a.rows,
          product.a.cols,
          product.b.rows,
          product.b.cols,
          product.a.stride,
          product.b.stride,
          added.stride,
          product.d.stride,
          alignmentOf(product.a.data),
          alignmentOf(product.b.data),
          alignmentOf(added.data),
          alignmentOf(product.d.data),
          product.bias ? alignmentOf(product.bias) : 0};
}

void Products::choose(const Product& product, Plan& plan) const {
  cublasLtMatmulPreference_t made = nullptr;
  check(cublasLtMatmulPreferenceCreate(&made), "limiting a product");
  const Preference preference(made);
  set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspaceBytes));
  const auto alignment = [](const Matrix& matrix) { return static_cast<uint32_t>(alignmentOf(matrix.data)); };
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(product.b));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(product.a));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(addedTo(product)));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(product.d));
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle_, plan.operation.get(), plan.b.get(), plan.a.get(), plan.added.get(), plan.d.get(),
                                     preference.get(), 1, &result, &found);
  const std::string what = "choosing an algorithm for a product of " + describeSizes(product);
  check(status, what.c_str());
  check(found > 0 ? result.state : CUBLAS_STATUS_NOT_SUPPORTED, what.c_str());
  plan.algorithm = result.algo;
}

Products::Plan& Products::planFor(const Product& product, const Key& key) {
  std::unique_ptr<Plan>& plan = plans_[key];
  if (plan) return *plan;
  auto made = std::make_unique<Plan>();
  made->operation = describe(product);
  made->a = layoutOf(product.a);
  made->b = layoutOf(product.b);
  made->added = layoutOf(addedTo(product));
  made->d = layoutOf(product.d);
  choose(product, *made);
  plan = std::move(made);
  return *plan;
}

void Products::run(const Product& product, Plan& plan) {
  if (product.bias) set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias);
  const bool wide = product.d.dtype == DType::f64;
  const float alpha = product.alpha, beta = product.added ? 1.0f : 0.0f;
  const double wideAlpha = alpha, wideBeta = beta;
  check(cublasLtMatmul(handle_, plan.operation.get(), wide ? static_cast<const void*>(&wideAlpha) : &alpha, product.b.data,
                       plan.b.get(), product.a.data, plan.a.get(), wide ? static_cast<const void*>(&wideBeta) : &beta,
                       addedTo(product).data, plan.added.get(), product.d.data, plan.d.get(), &plan.algorithm, workspace_,
                       workspaceBytes, queue_.stream()),
        "multiplying matrices");
}

// The plan is made outside of the recorded call, so that a search never falls into a capture.
void Products::multiply(const Product& product) {
  if (product.d.rows == 0 || product.d.cols == 0) return;
  const Key key = keyOf(product);
  Plan& plan = planFor(product, key);
  queue_.library([&] { run(product, plan); }, key, product.a.data, product.b.data, addedTo(product).data, product.d.data,
                 product.bias, product.alpha);
}

}  // namespace lora_da::cuda
