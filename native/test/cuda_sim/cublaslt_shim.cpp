// cuBLASLt's matrix product D = alpha op(A) op(B) + beta C (+ bias), column-major, for float32, bfloat16 and float64. Type
// combinations and attributes that the library does not support are refused as it refuses them; a descriptor's fields live in the
// opaque structs of its header. Elements are widened to the compute type, multiplied by OpenBLAS, and rounded once.
#include <cblas.h>
#include <cublasLt.h>
#include <cuda_bf16.h>

#include <cstring>
#include <type_traits>

#include "library_shim.h"

struct cublasLtContext {};

namespace {

using cuda_sim::Operand;

struct Layout {
  cudaDataType type;
  int32_t order;
  uint64_t rows, cols;
  int64_t leading;
};
struct Description {
  cublasComputeType_t compute;
  cudaDataType scale;
  int32_t pointerMode, transA, transB, biasType;
  uint32_t epilogue;
  const void* bias;
};
struct Preference {
  uint64_t workspaceBytes;
  uint32_t alignments[4];  // of A, B, C, D
};
// What an algorithm was chosen for, and what it asks of a call.
struct Algorithm {
  uint64_t problem;
  uint64_t workspaceBytes;
  uint32_t alignments[4];
};

template <class Fields, class Opaque>
Fields read(const Opaque* opaque) {
  static_assert(sizeof(Fields) <= sizeof(Opaque) && std::is_trivially_copyable<Fields>::value, "fields fit the opaque struct");
  Fields fields;
  std::memcpy(&fields, opaque, sizeof fields);
  return fields;
}
template <class Fields, class Opaque>
void write(Opaque* opaque, const Fields& fields) {
  static_assert(sizeof(Fields) <= sizeof(Opaque) && std::is_trivially_copyable<Fields>::value, "fields fit the opaque struct");
  std::memcpy(opaque, &fields, sizeof fields);
}

cuda_sim::Living<cublasLtContext>& handles() {
  static cuda_sim::Living<cublasLtContext> instance;
  return instance;
}

template <class T>
cublasStatus_t take(T& field, const void* value, size_t bytes) {
  if (!value || bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&field, value, sizeof(T));
  return CUBLAS_STATUS_SUCCESS;
}

size_t elementBytes(cudaDataType type) {
  switch (type) {
    case CUDA_R_64F: return 8;
    case CUDA_R_32F: return 4;
    case CUDA_R_16BF: return 2;
    default: return 0;
  }
}

struct Problem {
  Description operation;
  Layout a, b, c, d;

  int64_t m() const { return static_cast<int64_t>(d.rows); }
  int64_t n() const { return static_cast<int64_t>(d.cols); }
  int64_t k() const { return static_cast<int64_t>(operation.transA == CUBLAS_OP_N ? a.cols : a.rows); }
  bool hasBias() const { return operation.epilogue == CUBLASLT_EPILOGUE_BIAS; }

  // Of everything but the bias' address.
  uint64_t fingerprint() const {
    const uint64_t fields[] = {static_cast<uint64_t>(operation.compute),
                               static_cast<uint64_t>(operation.transA),
                               static_cast<uint64_t>(operation.transB),
                               operation.epilogue,
                               static_cast<uint64_t>(a.type),
                               static_cast<uint64_t>(c.type),
                               a.rows,
                               a.cols,
                               static_cast<uint64_t>(a.leading),
                               b.rows,
                               b.cols,
                               static_cast<uint64_t>(b.leading),
                               static_cast<uint64_t>(c.leading),
                               static_cast<uint64_t>(d.leading)};
    uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
    for (const uint64_t field : fields) hash = (hash ^ field) * 0x100000001b3u;
    return hash;
  }
};

bool isOneOf(cublasComputeType_t type, std::initializer_list<cublasComputeType_t> types) {
  return std::find(types.begin(), types.end(), type) != types.end();
}

// The rows of the library's table of types (cuBLAS documentation, cublasLtMatmul) that are implemented here.
bool supportedTypes(const Problem& p) {
  const cublasComputeType_t compute = p.operation.compute;
  if (p.a.type != p.b.type || p.c.type != p.d.type) return false;
  const bool defaultBias = p.operation.biasType == -1 || p.operation.biasType == static_cast<int32_t>(p.d.type);
  if (p.hasBias() && !defaultBias) return false;
  if (isOneOf(compute, {CUBLAS_COMPUTE_64F, CUBLAS_COMPUTE_64F_PEDANTIC})) {
    return p.operation.scale == CUDA_R_64F && p.a.type == CUDA_R_64F && p.d.type == CUDA_R_64F && !p.hasBias();
  }
  if (p.operation.scale != CUDA_R_32F) return false;
  if (isOneOf(compute, {CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_PEDANTIC})) {
    if (p.a.type == CUDA_R_16BF) return p.d.type == CUDA_R_16BF || p.d.type == CUDA_R_32F;
    return p.a.type == CUDA_R_32F && p.d.type == CUDA_R_32F;
  }
  return compute == CUBLAS_COMPUTE_32F_FAST_TF32 && p.a.type == CUDA_R_32F && p.d.type == CUDA_R_32F;
}

cublasStatus_t checkProblem(const Problem& p) {
  const bool plainA = p.operation.transA == CUBLAS_OP_N, plainB = p.operation.transB == CUBLAS_OP_N;
  for (const Layout& layout : {p.a, p.b, p.c, p.d}) {
    if (layout.rows == 0 || layout.cols == 0) return CUBLAS_STATUS_INVALID_VALUE;
    if (layout.order != CUBLASLT_ORDER_COL) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (layout.leading < static_cast<int64_t>(layout.rows)) return CUBLAS_STATUS_INVALID_VALUE;
  }
  const uint64_t innerB = plainB ? p.b.rows : p.b.cols;
  if ((plainA ? p.a.rows : p.a.cols) != p.d.rows || (plainB ? p.b.cols : p.b.rows) != p.d.cols ||
      innerB != static_cast<uint64_t>(p.k()) || p.c.rows != p.d.rows || p.c.cols != p.d.cols) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (p.operation.epilogue != CUBLASLT_EPILOGUE_DEFAULT && !p.hasBias()) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (p.operation.pointerMode != CUBLASLT_POINTER_MODE_HOST) return CUBLAS_STATUS_NOT_SUPPORTED;
  return supportedTypes(p) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

// Deep sums are cut into pieces that meet in the workspace.
uint64_t wantedWorkspace(const Problem& p) {
  constexpr int64_t deep = 64;
  return p.k() < deep ? 0 : static_cast<uint64_t>(p.m() * p.n()) * sizeof(float);
}

template <class T>
T element(const void* data, cudaDataType type, int64_t index) {
  switch (type) {
    case CUDA_R_64F: return static_cast<T>(static_cast<const double*>(data)[index]);
    case CUDA_R_32F: return static_cast<T>(static_cast<const float*>(data)[index]);
    default: return static_cast<T>(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]));
  }
}

template <class T>
void setElement(void* data, cudaDataType type, int64_t index, T value) {
  switch (type) {
    case CUDA_R_64F: static_cast<double*>(data)[index] = static_cast<double>(value); break;
    case CUDA_R_32F: static_cast<float*>(data)[index] = static_cast<float>(value); break;
    default: static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16(static_cast<float>(value));
  }
}

template <class T>
std::vector<T> widened(const void* data, const Layout& layout) {
  std::vector<T> all;
  all.reserve(layout.rows * layout.cols);
  for (uint64_t col = 0; col < layout.cols; ++col) {
    for (uint64_t row = 0; row < layout.rows; ++row) {
      all.push_back(element<T>(data, layout.type, static_cast<int64_t>(col) * layout.leading + static_cast<int64_t>(row)));
    }
  }
  return all;
}

CBLAS_TRANSPOSE blas(int32_t operation) {
  return operation == CUBLAS_OP_N ? CblasNoTrans : CblasTrans;
}
void gemm(const Problem& p, const std::vector<float>& a, const std::vector<float>& b, std::vector<float>& sum) {
  const int m = static_cast<int>(p.m()), n = static_cast<int>(p.n()), k = static_cast<int>(p.k());
  cblas_sgemm(CblasColMajor, blas(p.operation.transA), blas(p.operation.transB), m, n, k, 1, a.data(), static_cast<int>(p.a.rows),
              b.data(), static_cast<int>(p.b.rows), 0, sum.data(), m);
}
void gemm(const Problem& p, const std::vector<double>& a, const std::vector<double>& b, std::vector<double>& sum) {
  const int m = static_cast<int>(p.m()), n = static_cast<int>(p.n()), k = static_cast<int>(p.k());
  cblas_dgemm(CblasColMajor, blas(p.operation.transA), blas(p.operation.transB), m, n, k, 1, a.data(), static_cast<int>(p.a.rows),
              b.data(), static_cast<int>(p.b.rows), 0, sum.data(), m);
}

template <class T>
void multiply(const Problem& p, T alpha, const void* a, const void* b, T beta, const void* c, void* d) {
  std::vector<T> sum(p.d.rows * p.d.cols);
  gemm(p, widened<T>(a, p.a), widened<T>(b, p.b), sum);
  for (int64_t col = 0; col < p.n(); ++col) {
    for (int64_t row = 0; row < p.m(); ++row) {
      T value = alpha * sum[static_cast<size_t>(col * p.m() + row)];
      if (beta != 0) value += beta * element<T>(c, p.c.type, col * p.c.leading + row);
      if (p.hasBias()) value += element<T>(p.operation.bias, p.d.type, row);
      setElement(d, p.d.type, col * p.d.leading + row, value);
    }
  }
}

Operand operand(const char* name, const void* data, const Layout& layout) {
  return {name,
          data,
          static_cast<int64_t>(layout.rows),
          static_cast<int64_t>(layout.cols),
          layout.leading,
          elementBytes(layout.type)};
}

bool checkMemory(const Problem& p, const Operand& a, const Operand& b, const Operand& c, const Operand& d, bool readsC) {
  const char* routine = "cublasLtMatmul";
  std::vector<Operand> all = {a, b, d};
  if (readsC) all.push_back(c);
  if (p.hasBias()) all.push_back({"the bias", p.operation.bias, p.m(), 1, p.m(), elementBytes(p.d.type)});
  for (const Operand& each : all) {
    if (!cuda_sim::inDeviceMemory(routine, each)) return false;
  }
  const bool inPlace = c.data == d.data && c.leading == d.leading;
  return cuda_sim::apart(routine, d, a) && cuda_sim::apart(routine, d, b) &&
         (!readsC || inPlace || cuda_sim::apart(routine, d, c));
}

}  // namespace

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = handles().make();
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  return handles().end(handle) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_INITIALIZED;
}

const char* cublasLtGetStatusString(cublasStatus_t status) {
  return cublasGetStatusString(status);
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows, uint64_t cols,
                                          int64_t ld) {
  *layout = new cublasLtMatrixLayoutOpaque_t();
  write(*layout, Layout{type, CUBLASLT_ORDER_COL, rows, cols, ld});
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete layout;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* description, cublasComputeType_t compute, cudaDataType scale) {
  *description = new cublasLtMatmulDescOpaque_t();
  write(*description, Description{compute, scale, CUBLASLT_POINTER_MODE_HOST, CUBLAS_OP_N, CUBLAS_OP_N, -1,
                                  CUBLASLT_EPILOGUE_DEFAULT, nullptr});
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
  delete description;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  if (!description) return CUBLAS_STATUS_INVALID_VALUE;
  auto fields = read<Description>(description);
  cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_POINTER_MODE: status = take(fields.pointerMode, value, bytes); break;
    case CUBLASLT_MATMUL_DESC_TRANSA: status = take(fields.transA, value, bytes); break;
    case CUBLASLT_MATMUL_DESC_TRANSB: status = take(fields.transB, value, bytes); break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE: status = take(fields.epilogue, value, bytes); break;
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: status = take(fields.bias, value, bytes); break;
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: status = take(fields.biasType, value, bytes); break;
    default: break;
  }
  write(description, fields);
  return status;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  *preference = new cublasLtMatmulPreferenceOpaque_t();
  write(*preference, Preference{0, {256, 256, 256, 256}});
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete preference;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    size_t bytes) {
  if (!preference) return CUBLAS_STATUS_INVALID_VALUE;
  auto fields = read<Preference>(preference);
  cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: status = take(fields.workspaceBytes, value, bytes); break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: status = take(fields.alignments[0], value, bytes); break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: status = take(fields.alignments[1], value, bytes); break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: status = take(fields.alignments[2], value, bytes); break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: status = take(fields.alignments[3], value, bytes); break;
    default: break;
  }
  write(preference, fields);
  return status;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                              cublasLtMatrixLayout_t aLayout, cublasLtMatrixLayout_t bLayout,
                                              cublasLtMatrixLayout_t cLayout, cublasLtMatrixLayout_t dLayout,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t results[], int* found) {
  if (!handles().has(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!preference || requested < 1) return CUBLAS_STATUS_INVALID_VALUE;
  const Problem problem{read<Description>(description), read<Layout>(aLayout), read<Layout>(bLayout), read<Layout>(cLayout),
                        read<Layout>(dLayout)};
  *found = 0;
  if (const cublasStatus_t status = checkProblem(problem); status != CUBLAS_STATUS_SUCCESS) return status;
  const auto limits = read<Preference>(preference);
  const uint64_t wanted = wantedWorkspace(problem);
  Algorithm algorithm{problem.fingerprint(), wanted <= limits.workspaceBytes ? wanted : 0, {}};
  std::copy(limits.alignments, limits.alignments + 4, algorithm.alignments);
  results[0] = {};
  write(&results[0].algo, algorithm);
  results[0].workspaceSize = algorithm.workspaceBytes;
  results[0].state = CUBLAS_STATUS_SUCCESS;
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, const void* alpha, const void* A,
                              cublasLtMatrixLayout_t aLayout, const void* B, cublasLtMatrixLayout_t bLayout, const void* beta,
                              const void* C, cublasLtMatrixLayout_t cLayout, void* D, cublasLtMatrixLayout_t dLayout,
                              const cublasLtMatmulAlgo_t* chosen, void* workspace, size_t workspaceBytes, cudaStream_t stream) {
  if (!handles().has(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  const Problem problem{read<Description>(description), read<Layout>(aLayout), read<Layout>(bLayout), read<Layout>(cLayout),
                        read<Layout>(dLayout)};
  if (const cublasStatus_t status = checkProblem(problem); status != CUBLAS_STATUS_SUCCESS) return status;
  if (!alpha || !beta || !A || !B || !D || !chosen || (problem.hasBias() && !problem.operation.bias)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const auto algorithm = read<Algorithm>(chosen);
  if (algorithm.problem != problem.fingerprint()) return CUBLAS_STATUS_INVALID_VALUE;
  const void* pointers[] = {A, B, C, D};
  for (int i = 0; i < 4; ++i) {
    if (reinterpret_cast<uintptr_t>(pointers[i]) % algorithm.alignments[i] == 0) continue;
    cuda_sim::report(cudaErrorMisalignedAddress, "cublasLtMatmul: an operand is less aligned than its algorithm was chosen for");
    return CUBLAS_STATUS_EXECUTION_FAILED;
  }
  if (workspaceBytes < algorithm.workspaceBytes || reinterpret_cast<uintptr_t>(workspace) % 256 != 0) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const auto bytes = static_cast<int64_t>(workspaceBytes);
  const bool wide = problem.operation.scale == CUDA_R_64F;
  const bool readsC = wide ? *static_cast<const double*>(beta) != 0 : *static_cast<const float*>(beta) != 0;
  const Operand room{"the workspace", workspace, bytes, 1, bytes, 1};
  const Operand a = operand("A", A, problem.a), b = operand("B", B, problem.b), c = operand("C", C, problem.c),
                d = operand("D", D, problem.d);
  if (!cuda_sim::inDeviceMemory("cublasLtMatmul", room) || !checkMemory(problem, a, b, c, d, readsC)) {
    return CUBLAS_STATUS_EXECUTION_FAILED;
  }
  for (const Operand& each : {a, b, c, d}) {
    if (!cuda_sim::apart("cublasLtMatmul", room, each)) return CUBLAS_STATUS_EXECUTION_FAILED;
  }
  std::function<void()> product;
  if (wide) {
    product = [=, alpha = *static_cast<const double*>(alpha), beta = *static_cast<const double*>(beta)] {
      multiply<double>(problem, alpha, A, B, beta, C, D);
    };
  } else {
    product = [=, alpha = *static_cast<const float*>(alpha), beta = *static_cast<const float*>(beta)] {
      multiply<float>(problem, alpha, A, B, beta, C, D);
    };
  }
  const auto work = [product, workspace, used = algorithm.workspaceBytes] {
    cuda_sim::spoil(workspace, used);
    product();
  };
  const cudaError_t error = cuda_sim::enqueue(stream, "cublasLtMatmul", work, {A, B, C, D, workspace, problem.operation.bias});
  return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
