#include <algorithm>
#include <string>
#include <vector>

#include "core/lowest_eigenpairs.h"
#include "cuda/cuda_device.h"
#include "cuda/dense.h"
#include "cuda/library_errors.h"

namespace lora_da::cuda {

namespace {

constexpr cublasFillMode_t triangle = CUBLAS_FILL_MODE_UPPER;  // our lower one

constexpr int tile = 32;
constexpr int tileRows = 8;  // rows of threads, each with every eighth row of a tile

// a [n, n] row-major: a tile on or below the diagonal is written, transposed, above it. Tiles go through shared memory, with a
// column more, so that both reads and writes are of neighbours and no bank is hit twice.
__global__ void __launch_bounds__(tile* tileRows) mirrorLowerKernel(double* a, int64_t n) {
  auto* shared = sharedMemory<double>();  // [tile, tile + 1]
  if (blockIdx.x > blockIdx.y) return;
  const int64_t firstRow = static_cast<int64_t>(blockIdx.y) * tile, firstCol = static_cast<int64_t>(blockIdx.x) * tile;
  const int x = static_cast<int>(threadIdx.x);
  for (int y = static_cast<int>(threadIdx.y); y < tile; y += tileRows) {
    const int64_t row = firstRow + y, col = firstCol + x;
    if (row < n && col < n) shared[y * (tile + 1) + x] = a[row * n + col];
  }
  __syncthreads();
  for (int y = static_cast<int>(threadIdx.y); y < tile; y += tileRows) {
    const int64_t row = firstCol + y, col = firstRow + x;
    if (row < col && col < n) a[row * n + col] = shared[x * (tile + 1) + y];
  }
}

void lapackSucceeded(int info, const char* routine) {
  if (info != 0) throw Error(code::internal, std::string("cuSOLVER's ") + routine + " failed with info " + std::to_string(info));
}

int asInt(int64_t value) {
  return static_cast<int>(value);
}

}  // namespace

Dense::Dense(Queue& queue, std::function<void*(size_t)> scratch) : queue_(queue), scratch_(std::move(scratch)) {}

Dense::~Dense() {
  cudaStreamSynchronize(queue_.stream());  // work under way uses the workspace
  if (blas_) cublasDestroy(blas_);
  if (parameters_) cusolverDnDestroyParams(parameters_);
  if (solver_) cusolverDnDestroy(solver_);
  cudaFree(blasWorkspace_);
  cudaFree(info_);
}

cublasHandle_t Dense::blas() {
  if (!blas_) {
    if (!blasWorkspace_) check(cudaMalloc(&blasWorkspace_, blasWorkspaceBytes), "allocating the workspace of cuBLAS");
    check(cublasCreate(&blas_), "starting cuBLAS");
    check(cublasSetStream(blas_, queue_.stream()), "starting cuBLAS");
    check(cublasSetWorkspace(blas_, blasWorkspace_, blasWorkspaceBytes), "starting cuBLAS");
  }
  return blas_;
}

cusolverDnHandle_t Dense::solver() {
  if (!solver_) {
    void* info = nullptr;
    if (!info_) check(cudaMalloc(&info, sizeof(int)), "allocating the state of cuSOLVER");
    if (info) info_ = static_cast<int*>(info);
    if (!parameters_) check(cusolverDnCreateParams(&parameters_), "starting cuSOLVER");
    check(cusolverDnCreate(&solver_), "starting cuSOLVER");
    check(cusolverDnSetStream(solver_, queue_.stream()), "starting cuSOLVER");
  }
  return solver_;
}

int Dense::readInfo() {
  int info = 0;
  check(cudaMemcpyAsync(&info, info_, sizeof info, cudaMemcpyDeviceToHost, queue_.stream()), "reading a result back");
  queue_.synchronize();
  return info;
}

// --- products ------------------------------------------------------------------------------------------------------

void Dense::addSquare(const double* x, int64_t rows, int64_t width, const Matrix& z) {
  const cublasHandle_t handle = blas();
  const auto update = [&] {
    const double one = 1;
    check(cublasDsyrk(handle, triangle, CUBLAS_OP_N, asInt(width), asInt(rows), &one, x, asInt(width), &one, z.as<double>(),
                      asInt(z.stride)),
          "adding a second moment");
  };
  queue_.library(update, x, rows, width, z.data, z.stride);
}

void Dense::symmetricProduct(const double* a, int64_t n, int64_t m, double alpha, double beta, double* c) {
  check(cublasDsyrk(blas(), triangle, CUBLAS_OP_T, asInt(n), asInt(m), &alpha, a, asInt(m), &beta, c, asInt(n)),
        "multiplying a matrix with itself");
  mirrorLower(c, n);
}

void Dense::mirrorLower(double* a, int64_t n) {
  const auto tiles = static_cast<unsigned>((n + tile - 1) / tile);
  queue_.launch("mirrorLower", mirrorLowerKernel, dim3(tiles, tiles), dim3(tile, tileRows), tile * (tile + 1) * sizeof(double), a,
                n);
}

// --- Cholesky ------------------------------------------------------------------------------------------------------

Dense::WorkspaceBytes Dense::factorWorkspace(double* a, int64_t n) {
  const cusolverDnHandle_t handle = solver();
  WorkspaceBytes bytes;
  check(cusolverDnXpotrf_bufferSize(handle, parameters_, triangle, n, CUDA_R_64F, a, n, CUDA_R_64F, &bytes.device, &bytes.host),
        "sizing a factorization");
  return bytes;
}

size_t Dense::inverseBytes(double* a, int64_t n) {
  const cusolverDnHandle_t handle = solver();
  int elements = 0;
  check(cusolverDnDpotri_bufferSize(handle, triangle, asInt(n), a, asInt(n), &elements), "sizing an inversion");
  return static_cast<size_t>(elements) * sizeof(double);
}

int64_t Dense::choleskyFactor(double* a, int64_t n) {
  const WorkspaceBytes bytes = factorWorkspace(a, n);
  std::vector<char> hostWorkspace(bytes.host);
  check(cusolverDnXpotrf(solver(), parameters_, triangle, n, CUDA_R_64F, a, n, CUDA_R_64F, scratch_(bytes.device), bytes.device,
                         hostWorkspace.data(), bytes.host, info_),
        "factoring a matrix");
  const int info = readInfo();
  if (info < 0) lapackSucceeded(info, "potrf");
  return info;
}

void Dense::choleskyInverse(double* a, int64_t n) {
  const cusolverDnHandle_t handle = solver();
  const size_t bytes = inverseBytes(a, n);
  check(cusolverDnDpotri(handle, triangle, asInt(n), a, asInt(n), static_cast<double*>(scratch_(bytes)),
                         static_cast<int>(bytes / sizeof(double)), info_),
        "inverting a matrix");
  lapackSucceeded(readInfo(), "potri");
  mirrorLower(a, n);
}

// The library sees b^T and U = L^T, with U^T U = L L^T: b^T U^-1 U^-T.
void Dense::choleskySolve(const double* factor, int64_t n, double* b, int64_t m) {
  const double one = 1;
  for (const cublasOperation_t operation : {CUBLAS_OP_N, CUBLAS_OP_T}) {
    check(cublasDtrsm(blas(), CUBLAS_SIDE_RIGHT, triangle, operation, CUBLAS_DIAG_NON_UNIT, asInt(m), asInt(n), &one, factor,
                      asInt(n), b, asInt(m)),
          "solving with a factor");
  }
}

// --- eigenpairs ----------------------------------------------------------------------------------------------------

namespace {

// cuSOLVER's array of values has room for all n.
size_t valueBytes(int64_t n) {
  constexpr size_t alignment = 256;
  return (static_cast<size_t>(n) * sizeof(double) + alignment - 1) / alignment * alignment;
}

}  // namespace

Dense::WorkspaceBytes Dense::eigenRangeWorkspace(double* a, int64_t n, int64_t count) {
  const cusolverDnHandle_t handle = solver();
  double unusedLow = 0, unusedHigh = 0;
  int64_t found = 0;
  WorkspaceBytes bytes;
  check(cusolverDnXsyevdx_bufferSize(handle, parameters_, CUSOLVER_EIG_MODE_VECTOR, CUSOLVER_EIG_RANGE_I, triangle, n, CUDA_R_64F,
                                     a, n, &unusedLow, &unusedHigh, 1, count, &found, CUDA_R_64F, a, CUDA_R_64F, &bytes.device,
                                     &bytes.host),
        "sizing an eigensolver");
  return bytes;
}

void Dense::lowestEigenpairs(double* a, int64_t n, int64_t count, double* values, double* vectors) {
  const WorkspaceBytes bytes = eigenRangeWorkspace(a, n, count);
  auto* memory = static_cast<char*>(scratch_(valueBytes(n) + bytes.device));
  auto* allValues = reinterpret_cast<double*>(memory);
  std::vector<char> hostWorkspace(bytes.host);
  double unusedLow = 0, unusedHigh = 0;
  int64_t found = 0;
  check(cusolverDnXsyevdx(solver(), parameters_, CUSOLVER_EIG_MODE_VECTOR, CUSOLVER_EIG_RANGE_I, triangle, n, CUDA_R_64F, a, n,
                          &unusedLow, &unusedHigh, 1, count, &found, CUDA_R_64F, allValues, CUDA_R_64F, memory + valueBytes(n),
                          bytes.device, hostWorkspace.data(), bytes.host, info_),
        "finding eigenpairs");
  lapackSucceeded(readInfo(), "syevdx");
  lapackSucceeded(static_cast<int>(found - count), "syevdx (eigenvalues too many)");
  queue_.copy(values, allValues, static_cast<size_t>(count) * sizeof(double));
  queue_.copy(vectors, a, static_cast<size_t>(count * n) * sizeof(double));
}

size_t Dense::workspaceBytes(int64_t n, int64_t count) {
  blas();  // allocates what it works in once and for all
  solver();
  auto* unread = reinterpret_cast<double*>(info_);  // sizing asks for a matrix and looks at its order alone
  const size_t bytes = std::max(factorWorkspace(unread, n).device, inverseBytes(unread, n));
  return count == 0 ? bytes : std::max(bytes, valueBytes(n) + eigenRangeWorkspace(unread, n, count).device);
}

// --- the device's operations ---------------------------------------------------------------------------------------

// What the algebra works in stays, so that the search's memory comes beside all of it.
size_t CudaDevice::denseWorkspaceBytes(int64_t n, int64_t count) const {
  const bool searched = LowestEigenpairs::suits(n, count);
  return dense_->workspaceBytes(n, count) + (searched ? LowestEigenpairs::bytes(n, count) : 0);
}

int64_t CudaDevice::choleskyFactor(double* a, int64_t n) {
  return dense_->choleskyFactor(a, n);
}

void CudaDevice::choleskySolve(const double* factor, int64_t n, double* b, int64_t m) {
  dense_->choleskySolve(factor, n, b, m);
}

void CudaDevice::choleskyInverse(double* a, int64_t n) {
  dense_->choleskyInverse(a, n);
}

void CudaDevice::mirrorLower(double* a, int64_t n) {
  dense_->mirrorLower(a, n);
}

void CudaDevice::symmetricProduct(const double* a, int64_t n, int64_t m, double alpha, double beta, double* c) {
  dense_->symmetricProduct(a, n, m, alpha, beta, c);
}

void CudaDevice::lowestEigenpairs(double* a, int64_t n, int64_t count, double* values, double* vectors) {
  if (count < 1 || count > n) throw Error(code::invalidArgument, "lowestEigenpairs: count must lie between 1 and the order");
  if (LowestEigenpairs::suits(n, count) && LowestEigenpairs(*this, a, n, count).find(values, vectors)) return;
  dense_->lowestEigenpairs(a, n, count, values, vectors);
}

// One matrix of the orders that matter fills the device, and all work goes through one stream.
int CudaDevice::concurrency(int64_t) const {
  return 1;
}

void CudaDevice::concurrently(int64_t, int64_t items, const std::function<void(int64_t, int)>& body) {
  for (int64_t item = 0; item < items; ++item) body(item, 0);
}

}  // namespace lora_da::cuda
