// Dense float64 algebra on cuBLAS and cuSOLVER, enqueued on the device's stream. Both are column-major: they see a row-major
// array as its transpose, so that our lower triangle is their upper one, which all routines here read and write; the rows of an
// array of vectors are their columns. The libraries start with their first use: training alone needs neither.
#pragma once

#include <cublas_v2.h>
#include <cusolverDn.h>

#include <functional>

#include "core/device.h"
#include "cuda/queue.h"

namespace lora_da::cuda {

class Dense {
 public:
  // `scratch(bytes)` gives device memory that is valid until its next call.
  Dense(Queue& queue, std::function<void*(size_t)> scratch);
  ~Dense();
  Dense(const Dense&) = delete;

  // z [width, width] += x^T x for row-major x [rows, width], in the lower triangle.
  void addSquare(const double* x, int64_t rows, int64_t width, const Matrix& z);

  // The operations of core/device.h.
  int64_t choleskyFactor(double* a, int64_t n);
  void choleskySolve(const double* factor, int64_t n, double* b, int64_t m);
  void choleskyInverse(double* a, int64_t n);
  void mirrorLower(double* a, int64_t n);
  void symmetricProduct(const double* a, int64_t n, int64_t m, double alpha, double beta, double* c);
  // From a reduction of the whole matrix.
  void lowestEigenpairs(double* a, int64_t n, int64_t count, double* values, double* vectors);
  // What these still allocate for matrices of order n: their scratch, whatever of it there is already, and that of the libraries,
  // which this starts to ask them.
  size_t workspaceBytes(int64_t n, int64_t count);

 private:
  struct WorkspaceBytes {
    size_t device = 0, host = 0;
  };

  WorkspaceBytes factorWorkspace(double* a, int64_t n);
  size_t inverseBytes(double* a, int64_t n);
  WorkspaceBytes eigenRangeWorkspace(double* a, int64_t n, int64_t count);
  cublasHandle_t blas();
  cusolverDnHandle_t solver();
  int readInfo();

  // Recommended for sm_90 and later. Given explicitly, since a capture must not allocate.
  static constexpr size_t blasWorkspaceBytes = size_t{32} << 20;

  Queue& queue_;
  std::function<void*(size_t)> scratch_;
  cublasHandle_t blas_ = nullptr;
  void* blasWorkspace_ = nullptr;
  cusolverDnHandle_t solver_ = nullptr;
  cusolverDnParams_t parameters_ = nullptr;
  int* info_ = nullptr;  // of the last cuSOLVER routine, device memory
};

}  // namespace lora_da::cuda
