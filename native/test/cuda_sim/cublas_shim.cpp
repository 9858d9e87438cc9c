// cuBLAS' float64 routines on OpenBLAS. Scalars are read when the call is made (host pointer mode).
#include <cblas.h>

#include "library_shim.h"

struct cublasContext {
  cudaStream_t stream = nullptr;
  void* workspace = nullptr;
  size_t workspaceBytes = 0;
};

namespace {

using cuda_sim::Operand;

cuda_sim::Living<cublasContext>& handles() {
  static cuda_sim::Living<cublasContext> instance;
  return instance;
}

bool isTranspose(cublasOperation_t operation) {
  return operation != CUBLAS_OP_N;
}
bool valid(cublasOperation_t operation) {
  return operation == CUBLAS_OP_N || operation == CUBLAS_OP_T || operation == CUBLAS_OP_C;
}
bool valid(cublasFillMode_t triangle) {
  return triangle == CUBLAS_FILL_MODE_LOWER || triangle == CUBLAS_FILL_MODE_UPPER;
}
CBLAS_TRANSPOSE blas(cublasOperation_t operation) {
  return isTranspose(operation) ? CblasTrans : CblasNoTrans;
}
CBLAS_UPLO blas(cublasFillMode_t triangle) {
  return triangle == CUBLAS_FILL_MODE_LOWER ? CblasLower : CblasUpper;
}

Operand matrix(const char* name, const double* data, int64_t rows, int64_t cols, int leading) {
  return {name, data, rows, cols, leading, sizeof(double)};
}

cublasStatus_t enqueue(cublasHandle_t handle, const char* routine, std::function<void()> work, std::vector<const void*> touches) {
  void* workspace = handle->workspace;
  const size_t bytes = handle->workspaceBytes;
  if (workspace) touches.push_back(workspace);
  const auto whole = [work = std::move(work), workspace, bytes] {
    if (workspace) cuda_sim::spoil(workspace, bytes);
    work();
  };
  const cudaError_t error = cuda_sim::enqueue(handle->stream, routine, whole, std::move(touches));
  return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

}  // namespace

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  *handle = handles().make();
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
  return handles().end(handle) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_INITIALIZED;
}

// A new stream takes the library's own workspace again.
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  if (!handles().has(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  handle->stream = stream;
  handle->workspace = nullptr;
  handle->workspaceBytes = 0;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t bytes) {
  if (!handles().has(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (reinterpret_cast<uintptr_t>(workspace) % 256 != 0) return CUBLAS_STATUS_INVALID_VALUE;
  if (!cuda_sim::inDeviceMemory("cublasSetWorkspace",
                                {"the workspace", workspace, static_cast<int64_t>(bytes), 1, static_cast<int64_t>(bytes), 1})) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  handle->workspace = workspace;
  handle->workspaceBytes = bytes;
  return CUBLAS_STATUS_SUCCESS;
}

const char* cublasGetStatusString(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "success";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "the library was not initialized";
    case CUBLAS_STATUS_ALLOC_FAILED: return "the resource allocation failed";
    case CUBLAS_STATUS_INVALID_VALUE: return "an invalid value was passed";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "the functionality is not supported";
    case CUBLAS_STATUS_EXECUTION_FAILED: return "the execution failed";
    default: return "unknown status";
  }
}

// C [m, n] = alpha op(A) op(B) + beta C
cublasStatus_t cublasDgemm_v2(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
                              const double* alpha, const double* A, int lda, const double* B, int ldb, const double* beta,
                              double* C, int ldc) {
  if (!handles().has(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (m < 0 || n < 0 || k < 0 || !valid(transa) || !valid(transb) || !alpha || !beta) return CUBLAS_STATUS_INVALID_VALUE;
  const Operand a = matrix("A", A, isTranspose(transa) ? k : m, isTranspose(transa) ? m : k, lda);
  const Operand b = matrix("B", B, isTranspose(transb) ? n : k, isTranspose(transb) ? k : n, ldb);
  const Operand c = matrix("C", C, m, n, ldc);
  if (!a.leadingFits() || !b.leadingFits() || !c.leadingFits()) return CUBLAS_STATUS_INVALID_VALUE;
  if (!cuda_sim::placed("cublasDgemm", c, {a, b})) return CUBLAS_STATUS_EXECUTION_FAILED;
  const auto work = [=, alpha = *alpha, beta = *beta] {
    cblas_dgemm(CblasColMajor, blas(transa), blas(transb), m, n, k, alpha, A, lda, B, ldb, beta, C, ldc);
  };
  return enqueue(handle, "cublasDgemm", work, {A, B, C});
}

// C [n, n] = alpha op(A) op(A)^T + beta C in one triangle, op(A) [n, k]
cublasStatus_t cublasDsyrk_v2(cublasHandle_t handle, cublasFillMode_t uplo, cublasOperation_t trans, int n, int k,
                              const double* alpha, const double* A, int lda, const double* beta, double* C, int ldc) {
  if (!handles().has(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (n < 0 || k < 0 || !valid(trans) || !valid(uplo) || !alpha || !beta) return CUBLAS_STATUS_INVALID_VALUE;
  const Operand a = matrix("A", A, isTranspose(trans) ? k : n, isTranspose(trans) ? n : k, lda);
  const Operand c = matrix("C", C, n, n, ldc);
  if (!a.leadingFits() || !c.leadingFits()) return CUBLAS_STATUS_INVALID_VALUE;
  if (!cuda_sim::placed("cublasDsyrk", c, {a})) return CUBLAS_STATUS_EXECUTION_FAILED;
  const auto work = [=, alpha = *alpha, beta = *beta] {
    cblas_dsyrk(CblasColMajor, blas(uplo), blas(trans), n, k, alpha, A, lda, beta, C, ldc);
  };
  return enqueue(handle, "cublasDsyrk", work, {A, C});
}

// X op(A) = alpha B or op(A) X = alpha B, X in the place of B [m, n]
cublasStatus_t cublasDtrsm_v2(cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t uplo, cublasOperation_t trans,
                              cublasDiagType_t diag, int m, int n, const double* alpha, const double* A, int lda, double* B,
                              int ldb) {
  if (!handles().has(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  const bool left = side == CUBLAS_SIDE_LEFT;
  if (m < 0 || n < 0 || (!left && side != CUBLAS_SIDE_RIGHT) || !valid(trans) || !valid(uplo) || !alpha) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const int order = left ? m : n;
  const Operand a = matrix("A", A, order, order, lda), b = matrix("B", B, m, n, ldb);
  if (!a.leadingFits() || !b.leadingFits()) return CUBLAS_STATUS_INVALID_VALUE;
  if (!cuda_sim::placed("cublasDtrsm", b, {a})) return CUBLAS_STATUS_EXECUTION_FAILED;
  const auto work = [=, alpha = *alpha] {
    cblas_dtrsm(CblasColMajor, left ? CblasLeft : CblasRight, blas(uplo), blas(trans),
                diag == CUBLAS_DIAG_UNIT ? CblasUnit : CblasNonUnit, m, n, alpha, A, lda, B, ldb);
  };
  return enqueue(handle, "cublasDtrsm", work, {A, B});
}
