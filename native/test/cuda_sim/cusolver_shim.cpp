// cuSOLVER's dense float64 routines on LAPACK. Only float64 is there. What LAPACK needs beyond the caller's workspace it takes
// from the heap; the caller's is spoiled, and so are results that cuSOLVER leaves undefined.
#include <cusolverDn.h>

#include "library_shim.h"

extern "C" {
void dpotrf_(const char* uplo, const int* n, double* a, const int* lda, int* info, size_t);
void dpotri_(const char* uplo, const int* n, double* a, const int* lda, int* info, size_t);
void dsyevd_(const char* job, const char* uplo, const int* n, double* a, const int* lda, double* w, double* work,
             const int* lwork, int* iwork, const int* liwork, int* info, size_t, size_t);
}

struct cusolverDnContext {
  cudaStream_t stream = nullptr;
};
struct cusolverDnParams {};

namespace {

using cuda_sim::Operand;

constexpr int64_t blockColumns = 64;
constexpr size_t hostBytes = 192;  // any positive number, so that callers pass what they were told

cuda_sim::Living<cusolverDnContext>& handles() {
  static cuda_sim::Living<cusolverDnContext> instance;
  return instance;
}

cuda_sim::Living<cusolverDnParams>& parameters() {
  static cuda_sim::Living<cusolverDnParams> instance;
  return instance;
}

const char* letter(cublasFillMode_t triangle) {
  return triangle == CUBLAS_FILL_MODE_LOWER ? "L" : "U";
}

size_t panelBytes(int64_t n) {
  return static_cast<size_t>(blockColumns * n) * sizeof(double);
}

cusolverStatus_t checkMatrix(cusolverDnHandle_t handle, cublasFillMode_t uplo, int64_t n, const void* A, int64_t lda) {
  if (!handles().has(handle)) return CUSOLVER_STATUS_NOT_INITIALIZED;
  if (uplo != CUBLAS_FILL_MODE_LOWER && uplo != CUBLAS_FILL_MODE_UPPER) return CUSOLVER_STATUS_INVALID_VALUE;
  if (n < 1 || !A || lda < n) return CUSOLVER_STATUS_INVALID_VALUE;
  return CUSOLVER_STATUS_SUCCESS;
}

struct Workspace {
  void* memory;
  size_t bytes;
};

// A, the results and the workspaces of a call as they must lie in device memory.
cusolverStatus_t checkMemory(const std::string& routine, const Operand& a, const std::vector<Operand>& results,
                             const Workspace& given, size_t needed, int* info) {
  if (given.bytes < needed) {
    cuda_sim::report(cudaErrorInvalidValue, routine + ": the workspace is too small");
    return CUSOLVER_STATUS_INVALID_VALUE;
  }
  std::vector<Operand> all = results;
  const auto bytes = static_cast<int64_t>(given.bytes);
  all.push_back(a);
  all.push_back({"the workspace", given.memory, bytes, 1, bytes, 1});
  all.push_back({"info", info, 1, 1, 1, sizeof(int)});
  for (const Operand& operand : all) {
    if (!cuda_sim::inDeviceMemory(routine, operand)) return CUSOLVER_STATUS_EXECUTION_FAILED;
  }
  const Operand& workspace = all[all.size() - 2];
  for (const Operand& operand : all) {
    if (operand.data != workspace.data && !cuda_sim::apart(routine, workspace, operand)) return CUSOLVER_STATUS_EXECUTION_FAILED;
  }
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t enqueue(cusolverDnHandle_t handle, const char* routine, const Workspace& workspace, std::function<void()> work,
                         std::vector<const void*> touches) {
  touches.push_back(workspace.memory);
  const auto whole = [work = std::move(work), workspace] {
    cuda_sim::spoil(workspace.memory, workspace.bytes);
    work();
  };
  const cudaError_t error = cuda_sim::enqueue(handle->stream, routine, whole, std::move(touches));
  return error == cudaSuccess ? CUSOLVER_STATUS_SUCCESS : CUSOLVER_STATUS_EXECUTION_FAILED;
}

// All eigenvalues, ascending, and vectors of A (column-major), which these replace.
void eigen(bool vectors, cublasFillMode_t uplo, int n, double* a, int lda, double* w, int* info) {
  const char* job = vectors ? "V" : "N";
  const int query = -1;
  double size = 0;
  int integers = 0;
  dsyevd_(job, letter(uplo), &n, a, &lda, w, &size, &query, &integers, &query, info, 1, 1);
  std::vector<double> work(static_cast<size_t>(size));
  std::vector<int> integerWork(static_cast<size_t>(integers));
  const int workSize = static_cast<int>(size);
  dsyevd_(job, letter(uplo), &n, a, &lda, w, work.data(), &workSize, integerWork.data(), &integers, info, 1, 1);
}

struct EigenCall {
  cusolverDnHandle_t handle;
  const char* routine;
  cusolverEigMode_t job;
  cublasFillMode_t triangle;
  int64_t n;
  double* a;
  int64_t lda;
  int64_t first, last;  // of the wanted pairs, from 1
  double* w;
};

cusolverStatus_t runEigen(const EigenCall& call, const Workspace& device, const Workspace& host, int* info) {
  const Operand a{"A", call.a, call.n, call.n, call.lda, sizeof(double)};
  const Operand w{"W", call.w, call.n, 1, call.n, sizeof(double)};
  if (host.bytes < hostBytes || !host.memory) return CUSOLVER_STATUS_INVALID_VALUE;
  const cusolverStatus_t status = checkMemory(call.routine, a, {w}, device, panelBytes(call.n), info);
  if (status != CUSOLVER_STATUS_SUCCESS) return status;
  const auto work = [call, info] {
    eigen(call.job == CUSOLVER_EIG_MODE_VECTOR, call.triangle, static_cast<int>(call.n), call.a, static_cast<int>(call.lda),
          call.w, info);
    const int64_t found = call.last - call.first + 1;
    for (int64_t i = 0; i < found; ++i) {
      const double* from = call.a + (call.first - 1 + i) * call.lda;
      std::copy(from, from + call.n, call.a + i * call.lda);
      call.w[i] = call.w[call.first - 1 + i];
    }
    for (int64_t i = found; i < call.n; ++i) cuda_sim::spoil(call.a + i * call.lda, static_cast<size_t>(call.n) * sizeof(double));
    cuda_sim::spoil(call.w + found, static_cast<size_t>(call.n - found) * sizeof(double));
  };
  cuda_sim::spoil(host.memory, hostBytes);
  return enqueue(call.handle, call.routine, device, work, {call.a, call.w, info});
}

bool float64(std::initializer_list<cudaDataType> types) {
  return std::all_of(types.begin(), types.end(), [](cudaDataType type) { return type == CUDA_R_64F; });
}

}  // namespace

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle) {
  *handle = handles().make();
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t handle) {
  return handles().end(handle) ? CUSOLVER_STATUS_SUCCESS : CUSOLVER_STATUS_NOT_INITIALIZED;
}

cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t stream) {
  if (!handles().has(handle)) return CUSOLVER_STATUS_NOT_INITIALIZED;
  handle->stream = stream;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t* params) {
  *params = parameters().make();
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnDestroyParams(cusolverDnParams_t params) {
  return parameters().end(params) ? CUSOLVER_STATUS_SUCCESS : CUSOLVER_STATUS_INVALID_VALUE;
}

cusolverStatus_t cusolverDnXpotrf_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params, cublasFillMode_t uplo,
                                             int64_t n, cudaDataType dataTypeA, const void* A, int64_t lda,
                                             cudaDataType computeType, size_t* deviceSize, size_t* hostSize) {
  if (const cusolverStatus_t status = checkMatrix(handle, uplo, n, A, lda); status != CUSOLVER_STATUS_SUCCESS) return status;
  if (!parameters().has(params)) return CUSOLVER_STATUS_INVALID_VALUE;
  if (!float64({dataTypeA, computeType})) return CUSOLVER_STATUS_NOT_SUPPORTED;
  *deviceSize = panelBytes(n);
  *hostSize = hostBytes;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnXpotrf(cusolverDnHandle_t handle, cusolverDnParams_t params, cublasFillMode_t uplo, int64_t n,
                                  cudaDataType dataTypeA, void* A, int64_t lda, cudaDataType computeType, void* deviceBuffer,
                                  size_t deviceSize, void* hostBuffer, size_t hostSize, int* info) {
  if (const cusolverStatus_t status = checkMatrix(handle, uplo, n, A, lda); status != CUSOLVER_STATUS_SUCCESS) return status;
  if (!parameters().has(params)) return CUSOLVER_STATUS_INVALID_VALUE;
  if (!float64({dataTypeA, computeType})) return CUSOLVER_STATUS_NOT_SUPPORTED;
  if (hostSize < hostBytes || !hostBuffer) return CUSOLVER_STATUS_INVALID_VALUE;
  const Workspace workspace{deviceBuffer, deviceSize};
  const cusolverStatus_t status =
      checkMemory("cusolverDnXpotrf", {"A", A, n, n, lda, sizeof(double)}, {}, workspace, panelBytes(n), info);
  if (status != CUSOLVER_STATUS_SUCCESS) return status;
  const auto work = [=] {
    const int order = static_cast<int>(n), leading = static_cast<int>(lda);
    dpotrf_(letter(uplo), &order, static_cast<double*>(A), &leading, info, 1);
  };
  return enqueue(handle, "cusolverDnXpotrf", workspace, work, {A, info});
}

cusolverStatus_t cusolverDnDpotri_bufferSize(cusolverDnHandle_t handle, cublasFillMode_t uplo, int n, double* A, int lda,
                                             int* lwork) {
  if (const cusolverStatus_t status = checkMatrix(handle, uplo, n, A, lda); status != CUSOLVER_STATUS_SUCCESS) return status;
  *lwork = static_cast<int>(blockColumns) * n;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnDpotri(cusolverDnHandle_t handle, cublasFillMode_t uplo, int n, double* A, int lda, double* work,
                                  int lwork, int* devInfo) {
  if (const cusolverStatus_t status = checkMatrix(handle, uplo, n, A, lda); status != CUSOLVER_STATUS_SUCCESS) return status;
  const Workspace workspace{work, static_cast<size_t>(std::max(lwork, 0)) * sizeof(double)};
  const cusolverStatus_t status =
      checkMemory("cusolverDnDpotri", {"A", A, n, n, lda, sizeof(double)}, {}, workspace, panelBytes(n), devInfo);
  if (status != CUSOLVER_STATUS_SUCCESS) return status;
  const auto invert = [=] { dpotri_(letter(uplo), &n, A, &lda, devInfo, 1); };
  return enqueue(handle, "cusolverDnDpotri", workspace, invert, {A, devInfo});
}

cusolverStatus_t cusolverDnXsyevd_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t,
                                             cublasFillMode_t uplo, int64_t n, cudaDataType dataTypeA, const void* A, int64_t lda,
                                             cudaDataType dataTypeW, const void*, cudaDataType computeType, size_t* deviceSize,
                                             size_t* hostSize) {
  if (const cusolverStatus_t status = checkMatrix(handle, uplo, n, A, lda); status != CUSOLVER_STATUS_SUCCESS) return status;
  if (!parameters().has(params)) return CUSOLVER_STATUS_INVALID_VALUE;
  if (!float64({dataTypeA, dataTypeW, computeType})) return CUSOLVER_STATUS_NOT_SUPPORTED;
  *deviceSize = panelBytes(n);
  *hostSize = hostBytes;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnXsyevd(cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t jobz,
                                  cublasFillMode_t uplo, int64_t n, cudaDataType dataTypeA, void* A, int64_t lda,
                                  cudaDataType dataTypeW, void* W, cudaDataType computeType, void* deviceBuffer,
                                  size_t deviceSize, void* hostBuffer, size_t hostSize, int* info) {
  if (const cusolverStatus_t status = checkMatrix(handle, uplo, n, A, lda); status != CUSOLVER_STATUS_SUCCESS) return status;
  if (!parameters().has(params)) return CUSOLVER_STATUS_INVALID_VALUE;
  if (!float64({dataTypeA, dataTypeW, computeType})) return CUSOLVER_STATUS_NOT_SUPPORTED;
  const EigenCall call{handle, "cusolverDnXsyevd", jobz, uplo, n, static_cast<double*>(A), lda, 1, n, static_cast<double*>(W)};
  return runEigen(call, {deviceBuffer, deviceSize}, {hostBuffer, hostSize}, info);
}

cusolverStatus_t cusolverDnXsyevdx_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t,
                                              cusolverEigRange_t range, cublasFillMode_t uplo, int64_t n, cudaDataType dataTypeA,
                                              const void* A, int64_t lda, void*, void*, int64_t il, int64_t iu, int64_t* found,
                                              cudaDataType dataTypeW, const void*, cudaDataType computeType, size_t* deviceSize,
                                              size_t* hostSize) {
  if (const cusolverStatus_t status = checkMatrix(handle, uplo, n, A, lda); status != CUSOLVER_STATUS_SUCCESS) return status;
  if (!parameters().has(params)) return CUSOLVER_STATUS_INVALID_VALUE;
  if (!float64({dataTypeA, dataTypeW, computeType}) || range == CUSOLVER_EIG_RANGE_V) return CUSOLVER_STATUS_NOT_SUPPORTED;
  if (range == CUSOLVER_EIG_RANGE_I && (il < 1 || iu < il || iu > n)) return CUSOLVER_STATUS_INVALID_VALUE;
  *found = range == CUSOLVER_EIG_RANGE_I ? iu - il + 1 : n;
  *deviceSize = panelBytes(n);
  *hostSize = hostBytes;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnXsyevdx(cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t jobz,
                                   cusolverEigRange_t range, cublasFillMode_t uplo, int64_t n, cudaDataType dataTypeA, void* A,
                                   int64_t lda, void*, void*, int64_t il, int64_t iu, int64_t* found, cudaDataType dataTypeW,
                                   void* W, cudaDataType computeType, void* deviceBuffer, size_t deviceSize, void* hostBuffer,
                                   size_t hostSize, int* info) {
  if (const cusolverStatus_t status = checkMatrix(handle, uplo, n, A, lda); status != CUSOLVER_STATUS_SUCCESS) return status;
  if (!parameters().has(params)) return CUSOLVER_STATUS_INVALID_VALUE;
  if (!float64({dataTypeA, dataTypeW, computeType}) || range == CUSOLVER_EIG_RANGE_V) return CUSOLVER_STATUS_NOT_SUPPORTED;
  const bool some = range == CUSOLVER_EIG_RANGE_I;
  if (some && (il < 1 || iu < il || iu > n)) return CUSOLVER_STATUS_INVALID_VALUE;
  const EigenCall call{handle,        "cusolverDnXsyevdx",    jobz, uplo, n, static_cast<double*>(A), lda, some ? il : 1,
                       some ? iu : n, static_cast<double*>(W)};
  *found = call.last - call.first + 1;
  return runEigen(call, {deviceBuffer, deviceSize}, {hostBuffer, hostSize}, info);
}
