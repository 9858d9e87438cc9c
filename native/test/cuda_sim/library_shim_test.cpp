// What the stand-ins of the libraries refuse or report, each with a planted mistake, and that their results are right.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cusolverDn.h>

#include <cmath>
#include <limits>

#include "sim_test.h"

using namespace cuda_sim;

namespace {

constexpr size_t workspaceBytes = 4096;
const double undefined = std::numeric_limits<double>::quiet_NaN();

struct Blas {
  cublasHandle_t handle = nullptr;
  explicit Blas(cudaStream_t stream) {
    REQUIRE(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS);
    REQUIRE(cublasSetStream(handle, stream) == CUBLAS_STATUS_SUCCESS);
  }
  ~Blas() { cublasDestroy(handle); }
  operator cublasHandle_t() const { return handle; }
};

struct Solver {
  cusolverDnHandle_t handle = nullptr;
  cusolverDnParams_t parameters = nullptr;
  explicit Solver(cudaStream_t stream) {
    REQUIRE(cusolverDnCreate(&handle) == CUSOLVER_STATUS_SUCCESS);
    REQUIRE(cusolverDnCreateParams(&parameters) == CUSOLVER_STATUS_SUCCESS);
    REQUIRE(cusolverDnSetStream(handle, stream) == CUSOLVER_STATUS_SUCCESS);
  }
  ~Solver() {
    cusolverDnDestroyParams(parameters);
    cusolverDnDestroy(handle);
  }
};

// A product D [2, 3] = A [2, 2] B [2, 3] + C, column-major, whose parts a test may spoil.
struct LtProduct {
  cublasLtHandle_t handle = nullptr;
  cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
  cudaDataType scale = CUDA_R_32F, inputs = CUDA_R_32F, outputs = CUDA_R_32F;
  int64_t leadingA = 2, leadingD = 2;
  uint32_t alignmentA = 16;
  uint64_t workspaceLimit = workspaceBytes;
  uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;
  int32_t biasType = -1;
  uint64_t depth = 2;

  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;
  cublasLtMatmulHeuristicResult_t found{};

  LtProduct() { REQUIRE(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS); }
  ~LtProduct() {
    forget();
    cublasLtDestroy(handle);
  }
  void forget() {
    if (operation) cublasLtMatmulDescDestroy(operation);
    for (cublasLtMatrixLayout_t layout : {a, b, d}) {
      if (layout) cublasLtMatrixLayoutDestroy(layout);
    }
    if (preference) cublasLtMatmulPreferenceDestroy(preference);
  }
  cublasStatus_t choose() {
    forget();
    cublasLtMatmulDescCreate(&operation, compute, scale);
    cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &biasType, sizeof biasType);
    cublasLtMatrixLayoutCreate(&a, inputs, 2, depth, leadingA);
    cublasLtMatrixLayoutCreate(&b, inputs, depth, 3, static_cast<int64_t>(depth));
    cublasLtMatrixLayoutCreate(&d, outputs, 2, 3, leadingD);
    cublasLtMatmulPreferenceCreate(&preference);
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspaceLimit,
                                         sizeof workspaceLimit);
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignmentA, sizeof alignmentA);
    int count = 0;
    return cublasLtMatmulAlgoGetHeuristic(handle, operation, a, b, d, d, preference, 1, &found, &count);
  }
  cublasStatus_t run(const void* A, const void* B, const void* C, void* D, void* workspace, size_t bytes, cudaStream_t stream) {
    const float alpha = 1, beta = C == D ? 0.0f : 1.0f;
    return cublasLtMatmul(handle, operation, &alpha, A, a, B, b, &beta, C, d, D, d, &found.algo, workspace, bytes, stream);
  }
};

}  // namespace

TEST_CASE("cuBLAS multiplies column-major matrices when its stream is waited for, not before") {
  const Fresh fresh;
  const Stream stream;
  const Blas blas(stream);
  const DeviceArray<double> a({1, 2, 3, 4}), b({5, 6, 7, 8}), c(std::vector<double>(4, undefined));
  const double one = 1, zero = 0;
  CHECK(cublasDgemm(blas, CUBLAS_OP_N, CUBLAS_OP_T, 2, 2, 2, &one, a.data, 2, b.data, 2, &zero, c.data, 2) ==
        CUBLAS_STATUS_SUCCESS);
  CHECK(queuedOperations() > 0);
  CHECK(c.host() == std::vector<double>{26, 38, 30, 44});
}

TEST_CASE("cuBLAS refuses a leading dimension below the rows, and one beyond the memory is reported") {
  const Fresh fresh;
  const Stream stream;
  const Blas blas(stream);
  const DeviceArray<double> a({1, 2, 3, 4}), b({5, 6, 7, 8}), c(4);
  const double one = 1, zero = 0;
  const auto multiply = [&](int lda, int ldb, int ldc) {
    return cublasDgemm(blas, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 2, &one, a.data, lda, b.data, ldb, &zero, c.data, ldc);
  };
  CHECK(multiply(1, 2, 2) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(multiply(2, 1, 2) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(multiply(2, 2, 1) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(lastReport().empty());
  CHECK(multiply(2, 3, 2) == CUBLAS_STATUS_EXECUTION_FAILED);
  checkReported(cudaErrorIllegalAddress, "B [2, 2] with leading dimension 3");
}

TEST_CASE("cuBLAS' rank-k update and triangular solve refuse a wrong leading dimension") {
  const Fresh fresh;
  const Stream stream;
  const Blas blas(stream);
  const DeviceArray<double> a(6), c(9);
  const double one = 1;
  const auto update = [&](int lda, int ldc) {
    return cublasDsyrk(blas, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N, 3, 2, &one, a.data, lda, &one, c.data, ldc);
  };
  CHECK(update(2, 3) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(update(3, 2) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(cublasDtrsm(blas, CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT, 2, 3, &one, c.data, 2,
                    a.data, 2) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(update(3, 3) == CUBLAS_STATUS_SUCCESS);
  CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
}

TEST_CASE("a library that reads host memory is reported") {
  const Fresh fresh;
  const Stream stream;
  const Blas blas(stream);
  const double one = 1, host[4] = {};
  const DeviceArray<double> c(4);
  CHECK(cublasDsyrk(blas, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N, 2, 2, &one, host, 2, &one, c.data, 2) ==
        CUBLAS_STATUS_EXECUTION_FAILED);
  checkReported(cudaErrorIllegalAddress, "A [2, 2]");
}

TEST_CASE("cuBLAS takes an aligned workspace in device memory only, and spoils it") {
  const Fresh fresh;
  const Stream stream;
  const Blas blas(stream);
  const DeviceArray<double> a({1, 2, 3, 4}), c({0, 0, 0, 0});
  const DeviceArray<char> workspace(std::vector<char>(workspaceBytes, 1));
  CHECK(cublasSetWorkspace(blas, workspace.data + 16, 512) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(cublasSetWorkspace(blas, workspace.data, workspaceBytes) == CUBLAS_STATUS_SUCCESS);
  const double one = 1;
  CHECK(cublasDsyrk(blas, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N, 2, 2, &one, a.data, 2, &one, c.data, 2) == CUBLAS_STATUS_SUCCESS);
  CHECK(c.host() == std::vector<double>{10, 0, 14, 20});
  CHECK(workspace.host()[17] == static_cast<char>(0xFF));
}

TEST_CASE("cuBLASLt adds C and a bias to a product of bfloat16 matrices") {
  const Fresh fresh;
  const Stream stream;
  const auto bf16 = [](std::vector<float> values) {
    std::vector<__nv_bfloat16> result;
    for (const float value : values) result.push_back(__float2bfloat16(value));
    return result;
  };
  const DeviceArray<__nv_bfloat16> a(bf16({1, 2, 3, 4})), b(bf16({1, 0, 0, 1, 1, 1}));
  const DeviceArray<float> c({1, 1, 1, 1, 1, 1}), bias({10, 20}), d(6);
  const DeviceArray<char> workspace(workspaceBytes);
  LtProduct product;
  product.inputs = CUDA_R_16BF;
  product.epilogue = CUBLASLT_EPILOGUE_BIAS;
  product.bias = bias.data;
  REQUIRE(product.choose() == CUBLAS_STATUS_SUCCESS);
  CHECK(product.run(a.data, b.data, c.data, d.data, workspace.data, workspaceBytes, stream) == CUBLAS_STATUS_SUCCESS);
  CHECK(d.host() == std::vector<float>{12, 23, 14, 25, 15, 27});
}

TEST_CASE("cuBLASLt refuses types that it has no product for") {
  const Fresh fresh;
  LtProduct product;
  product.epilogue = CUBLASLT_EPILOGUE_BIAS;
  product.inputs = product.outputs = CUDA_R_16BF;
  product.biasType = CUDA_R_32F;  // a bias has the result's type
  CHECK(product.choose() == CUBLAS_STATUS_NOT_SUPPORTED);
  product.biasType = CUDA_R_16BF;
  CHECK(product.choose() == CUBLAS_STATUS_SUCCESS);
  product.inputs = CUDA_R_32F;  // float32 in, bfloat16 out
  CHECK(product.choose() == CUBLAS_STATUS_NOT_SUPPORTED);
  product.outputs = product.inputs = CUDA_R_64F;
  product.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  CHECK(product.choose() == CUBLAS_STATUS_NOT_SUPPORTED);  // in float32 arithmetic
  product.compute = CUBLAS_COMPUTE_64F;
  product.scale = CUDA_R_64F;
  CHECK(product.choose() == CUBLAS_STATUS_SUCCESS);
  product.epilogue = CUBLASLT_EPILOGUE_BIAS;  // float64 products have none
  CHECK(product.choose() == CUBLAS_STATUS_NOT_SUPPORTED);
}

TEST_CASE("cuBLASLt refuses a leading dimension below the rows, and one beyond the memory is reported") {
  const Fresh fresh;
  const Stream stream;
  LtProduct product;
  product.leadingA = 1;
  CHECK(product.choose() == CUBLAS_STATUS_INVALID_VALUE);
  product.leadingA = 2;
  product.leadingD = 3;
  REQUIRE(product.choose() == CUBLAS_STATUS_SUCCESS);
  const DeviceArray<float> a(4), b(6), d(6);
  const DeviceArray<char> workspace(workspaceBytes);
  CHECK(product.run(a.data, b.data, d.data, d.data, workspace.data, workspaceBytes, stream) == CUBLAS_STATUS_EXECUTION_FAILED);
  checkReported(cudaErrorIllegalAddress, "D [2, 3] with leading dimension 3");
}

TEST_CASE("cuBLASLt refuses a workspace that is smaller than its algorithm was chosen with") {
  const Fresh fresh;
  const Stream stream;
  LtProduct product;
  product.depth = 200;
  REQUIRE(product.choose() == CUBLAS_STATUS_SUCCESS);
  REQUIRE(product.found.workspaceSize > 0);
  const DeviceArray<float> a(std::vector<float>(400, 1)), b(std::vector<float>(600, 2)), d(6);
  const DeviceArray<char> workspace(workspaceBytes);
  const auto run = [&](char* memory, size_t bytes) { return product.run(a.data, b.data, d.data, d.data, memory, bytes, stream); };
  CHECK(run(workspace.data, product.found.workspaceSize - 1) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(run(workspace.data + 16, product.found.workspaceSize) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(run(workspace.data, product.found.workspaceSize) == CUBLAS_STATUS_SUCCESS);
  CHECK(d.host() == std::vector<float>(6, 400.0f));
  product.workspaceLimit = 0;
  REQUIRE(product.choose() == CUBLAS_STATUS_SUCCESS);
  CHECK(product.found.workspaceSize == 0);
}

TEST_CASE("an operand less aligned than its algorithm was chosen for is reported") {
  const Fresh fresh;
  const Stream stream;
  LtProduct product;
  REQUIRE(product.choose() == CUBLAS_STATUS_SUCCESS);
  const DeviceArray<float> a(8), b(6), d(6);
  const DeviceArray<char> workspace(workspaceBytes);
  CHECK(product.run(a.data + 1, b.data, d.data, d.data, workspace.data, workspaceBytes, stream) ==
        CUBLAS_STATUS_EXECUTION_FAILED);
  checkReported(cudaErrorMisalignedAddress, "less aligned");
}

TEST_CASE("an algorithm serves the problem that it was chosen for only") {
  const Fresh fresh;
  const Stream stream;
  LtProduct product;
  REQUIRE(product.choose() == CUBLAS_STATUS_SUCCESS);
  const cublasLtMatmulHeuristicResult_t other = product.found;
  product.depth = 3;
  REQUIRE(product.choose() == CUBLAS_STATUS_SUCCESS);
  product.found = other;
  const DeviceArray<float> a(6), b(9), d(6);
  const DeviceArray<char> workspace(workspaceBytes);
  CHECK(product.run(a.data, b.data, d.data, d.data, workspace.data, workspaceBytes, stream) == CUBLAS_STATUS_INVALID_VALUE);
}

TEST_CASE("a result that lies over an operand is reported") {
  const Fresh fresh;
  const Stream stream;
  LtProduct product;
  REQUIRE(product.choose() == CUBLAS_STATUS_SUCCESS);
  const DeviceArray<float> a(16), b(6);
  const DeviceArray<char> workspace(workspaceBytes);
  CHECK(product.run(a.data, b.data, a.data, a.data, workspace.data, workspaceBytes, stream) == CUBLAS_STATUS_EXECUTION_FAILED);
  checkReported(cudaErrorIllegalAddress, "D is written over A");
}

TEST_CASE("cuSOLVER factors in place and tells the order of a minor that is not positive") {
  const Fresh fresh;
  const Stream stream;
  const Solver solver(stream);
  const DeviceArray<double> a({4, 2, 2, 5}), bad({1, 2, 2, 1});
  const DeviceArray<int> info(1);
  size_t device = 0, host = 0;
  const auto factor = [&](double* matrix, size_t bytes, int64_t leading) {
    REQUIRE(cusolverDnXpotrf_bufferSize(solver.handle, solver.parameters, CUBLAS_FILL_MODE_UPPER, 2, CUDA_R_64F, matrix, 2,
                                        CUDA_R_64F, &device, &host) == CUSOLVER_STATUS_SUCCESS);
    const DeviceArray<char> workspace(device);
    std::vector<char> hostWorkspace(host);
    const cusolverStatus_t status =
        cusolverDnXpotrf(solver.handle, solver.parameters, CUBLAS_FILL_MODE_UPPER, 2, CUDA_R_64F, matrix, leading, CUDA_R_64F,
                         workspace.data, std::min(bytes, device), hostWorkspace.data(), host, info.data);
    cudaStreamSynchronize(stream);
    return status;
  };
  CHECK(factor(a.data, SIZE_MAX, 2) == CUSOLVER_STATUS_SUCCESS);
  CHECK(info.host()[0] == 0);
  CHECK(a.host() == std::vector<double>{2, 2, 1, 2});
  CHECK(factor(bad.data, SIZE_MAX, 2) == CUSOLVER_STATUS_SUCCESS);
  CHECK(info.host()[0] == 2);
  CHECK(factor(bad.data, SIZE_MAX, 1) == CUSOLVER_STATUS_INVALID_VALUE);
  CHECK(lastReport().empty());
  CHECK(factor(bad.data, 8, 2) == CUSOLVER_STATUS_INVALID_VALUE);
  checkReported(cudaErrorInvalidValue, "the workspace is too small");
}

TEST_CASE("cuSOLVER's range of eigenpairs comes first, and what is left of the arrays is undefined") {
  const Fresh fresh;
  const Stream stream;
  const Solver solver(stream);
  const DeviceArray<double> a({3, 0, 0, 0, 1, 0, 0, 0, 2}), values(3);
  const DeviceArray<int> info(1);
  size_t device = 0, host = 0;
  int64_t found = 0;
  const auto size = [&](int64_t first, int64_t last) {
    return cusolverDnXsyevdx_bufferSize(solver.handle, solver.parameters, CUSOLVER_EIG_MODE_VECTOR, CUSOLVER_EIG_RANGE_I,
                                        CUBLAS_FILL_MODE_UPPER, 3, CUDA_R_64F, a.data, 3, nullptr, nullptr, first, last, &found,
                                        CUDA_R_64F, values.data, CUDA_R_64F, &device, &host);
  };
  CHECK(size(0, 2) == CUSOLVER_STATUS_INVALID_VALUE);
  CHECK(size(2, 4) == CUSOLVER_STATUS_INVALID_VALUE);
  REQUIRE(size(1, 2) == CUSOLVER_STATUS_SUCCESS);
  const DeviceArray<char> workspace(device);
  std::vector<char> hostWorkspace(host);
  REQUIRE(cusolverDnXsyevdx(solver.handle, solver.parameters, CUSOLVER_EIG_MODE_VECTOR, CUSOLVER_EIG_RANGE_I,
                            CUBLAS_FILL_MODE_UPPER, 3, CUDA_R_64F, a.data, 3, nullptr, nullptr, 1, 2, &found, CUDA_R_64F,
                            values.data, CUDA_R_64F, workspace.data, device, hostWorkspace.data(), host,
                            info.data) == CUSOLVER_STATUS_SUCCESS);
  CHECK(found == 2);
  const std::vector<double> w = values.host(), vectors = a.host();
  CHECK(info.host()[0] == 0);
  CHECK(w[0] == 1);
  CHECK(w[1] == 2);
  CHECK(std::isnan(w[2]));
  CHECK(std::abs(vectors[1]) == 1);
  CHECK(std::abs(vectors[5]) == 1);
  CHECK(std::isnan(vectors[6]));
}

TEST_CASE("a handle that was never made or is gone is refused") {
  const Fresh fresh;
  const DeviceArray<double> a(4), c(4);
  const double one = 1;
  cublasHandle_t handle = nullptr;
  CHECK(cublasSetStream(handle, nullptr) == CUBLAS_STATUS_NOT_INITIALIZED);
  REQUIRE(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS);
  REQUIRE(cublasDestroy(handle) == CUBLAS_STATUS_SUCCESS);
  CHECK(cublasDsyrk(handle, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N, 2, 2, &one, a.data, 2, &one, c.data, 2) ==
        CUBLAS_STATUS_NOT_INITIALIZED);
}
