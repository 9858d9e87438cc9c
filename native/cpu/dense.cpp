// Dense float64 algebra of the CPU device on LAPACK (OpenBLAS).
//
// LAPACK is column-major, our arrays are row-major, so LAPACK sees each array transposed. A symmetric matrix does not notice, except that
// our lower triangle is its upper one ("U" below); a Cholesky factor L is seen as U = L^T with U^T U = L L^T; and the columns of its
// eigenvectors are our rows. CBLAS knows of row-major arrays.
// OpenBLAS' number of threads is set once, by the device's constructor. Its OpenMP build follows the calling thread's own setting.
#include <cblas.h>
#include <omp.h>

#include <algorithm>
#include <string>
#include <vector>

#include "core/error.h"
#include "cpu/cpu_device.h"
#include "cpu/lapack.h"

namespace lora_da::cpu {

namespace {

// 64 x 64 doubles are 32 KB: one block of each side stays in the first-level cache.
constexpr int64_t kMirrorBlock = 64;

void lapackSucceeded(int info, const char* routine) {
  if (info != 0) throw Error(code::internal, std::string("LAPACK's ") + routine + " failed with info " + std::to_string(info));
}

// The upper triangle of a [n, n] becomes the mirror image of the lower one.
void mirrorLower(double* a, int64_t n, int threads) {
  const int64_t blocks = (n + kMirrorBlock - 1) / kMirrorBlock;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kMirrorBlock, last = std::min(n, first + kMirrorBlock);
    for (int64_t column = 0; column <= first; column += kMirrorBlock) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t end = std::min(i, column + kMirrorBlock);
        for (int64_t j = column; j < end; ++j) a[j * n + i] = a[i * n + j];
      }
    }
  }
}

// LAPACK's factorizations and reductions meet at a barrier several times a column or block. Below this order two threads gain at most a
// third of the time while they have the cores to themselves, and lose a factor of six and more when they do not: a reduction of order
// 1536 took 0.2 s on one thread and 1.2 s on two of a busy machine, a Cholesky inverse 0.1 s and 0.2 to 3 s. Products and triangular
// solves, which meet rarely, always use all threads.
constexpr int64_t kThreadedOrder = 2048;

class LapackThreads {
 public:
  explicit LapackThreads(int64_t order) : before_(omp_get_max_threads()) {
    if (order < kThreadedOrder) omp_set_num_threads(1);
  }
  ~LapackThreads() { omp_set_num_threads(before_); }
  LapackThreads(const LapackThreads&) = delete;

 private:
  int before_;
};

// LAPACK's blocked routines take panels of at most this many columns.
constexpr size_t kLapackBlock = 64;

// dstemr orders the two eigenvalues of a 2 x 2 matrix by magnitude (LAPACK 3.9 .. 3.11), so the smallest orders go through QR iteration.
void tinyEigenpairs(double* a, int64_t n, int64_t count, double* values, double* vectors) {
  const int order = static_cast<int>(n), workSize = 8;
  double all[2], work[workSize];
  int info = 0;
  dsyev_("V", "L", &order, a, &order, all, work, &workSize, &info, 1, 1);
  lapackSucceeded(info, "dsyev");
  std::copy(all, all + count, values);
  std::copy(a, a + count * n, vectors);
}

}  // namespace

int64_t CpuDevice::choleskyFactor(double* a, int64_t n) {
  const int order = static_cast<int>(n);
  const LapackThreads threads(n);
  int info = 0;
  dpotrf_("U", &order, a, &order, &info, 1);
  if (info < 0) lapackSucceeded(info, "dpotrf");
  return info;
}

void CpuDevice::choleskySolve(const double* factor, int64_t n, double* b, int64_t m) {
  const int order = static_cast<int>(n), columns = static_cast<int>(m);
  for (const CBLAS_TRANSPOSE side : {CblasNoTrans, CblasTrans}) {
    cblas_dtrsm(CblasRowMajor, CblasLeft, CblasLower, side, CblasNonUnit, order, columns, 1.0, factor, order, b, columns);
  }
}

void CpuDevice::choleskyInverse(double* a, int64_t n) {
  const int order = static_cast<int>(n);
  {
    const LapackThreads threads(n);
    int info = 0;
    dpotri_("U", &order, a, &order, &info, 1);
    lapackSucceeded(info, "dpotri");
  }
  mirrorLower(a, n, threads_);
}

void CpuDevice::symmetricProduct(const double* a, int64_t n, int64_t m, double alpha, double beta, double* c) {
  const int order = static_cast<int>(n), inner = static_cast<int>(m);
  cblas_dsyrk(CblasRowMajor, CblasLower, CblasNoTrans, order, inner, alpha, a, inner, beta, c, order);
  mirrorLower(c, n, threads_);
}

// Householder reduction to tridiagonal form, the wanted eigenpairs of that by relatively robust representations (dstemr), and back.
void CpuDevice::lowestEigenpairs(double* a, int64_t n, int64_t count, double* values, double* vectors) {
  if (count < 1 || count > n) throw Error(code::invalidArgument, "lowestEigenpairs: count must lie between 1 and the order");
  if (n <= 2) return tinyEigenpairs(a, n, count, values, vectors);
  const LapackThreads threads(n);
  const int order = static_cast<int>(n), wanted = static_cast<int>(count), first = 1;
  const size_t size = static_cast<size_t>(n);
  std::vector<double> doubles(3 * size + std::max(18 * size, kLapackBlock * (size + static_cast<size_t>(count))));
  double *diagonal = doubles.data(), *offDiagonal = diagonal + n, *tau = offDiagonal + n, *work = tau + n;
  const int workSize = static_cast<int>(doubles.size() - 3 * size);
  int info = 0;
  dsytrd_("L", &order, a, &order, diagonal, offDiagonal, tau, work, &workSize, &info, 1);
  lapackSucceeded(info, "dsytrd");

  std::vector<double> allValues(size);
  std::vector<int> integers(10 * size), support(2 * static_cast<size_t>(count));
  const int integerSize = static_cast<int>(integers.size());
  const double unused = 0;
  int found = 0, tryHighAccuracy = 1;
  dstemr_("V", "I", &order, diagonal, offDiagonal, &unused, &unused, &first, &wanted, &found, allValues.data(), vectors, &order, &wanted,
          support.data(), &tryHighAccuracy, work, &workSize, integers.data(), &integerSize, &info, 1, 1);
  lapackSucceeded(info, "dstemr");
  if (found != wanted) throw Error(code::internal, "LAPACK's dstemr found " + std::to_string(found) + " of " + std::to_string(wanted) + " eigenpairs");
  dormtr_("L", "L", "N", &order, &wanted, a, &order, tau, vectors, &order, work, &workSize, &info, 1, 1, 1);
  lapackSucceeded(info, "dormtr");
  std::copy(allValues.begin(), allValues.begin() + count, values);
}

}  // namespace lora_da::cpu
