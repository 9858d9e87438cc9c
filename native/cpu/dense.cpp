// Dense float64 algebra of the CPU device on LAPACK (OpenBLAS).
//
// LAPACK is column-major, our arrays are row-major, so LAPACK sees each array transposed. A symmetric matrix does not notice,
// except that our lower triangle is its upper one ("U" below); a Cholesky factor L is seen as U = L^T with U^T U = L L^T; and the
// columns of its eigenvectors are our rows. CBLAS knows of row-major arrays. OpenBLAS' number of threads is set once, by the
// device's constructor. Its OpenMP build follows the calling thread's own setting.
#include <cblas.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/lowest_eigenpairs.h"
#include "cpu/cpu_device.h"
#include "cpu/lapack.h"

namespace lora_da::cpu {

namespace {

// 64 x 64 doubles are 32 KB: one block of each side stays in the first-level cache.
constexpr int64_t kMirrorBlock = 64;

void lapackSucceeded(int info, const char* routine) {
  if (info != 0) throw Error(code::internal, std::string("LAPACK's ") + routine + " failed with info " + std::to_string(info));
}

// LAPACK's factorizations and reductions meet at a barrier several times a column or block. Below this order two threads gain at
// most a third of the time while they have the cores to themselves, and lose a factor of six and more when they do not: a
// reduction of order 1536 took 0.2 s on one thread and 1.2 s on two of a busy machine, a Cholesky inverse 0.1 s and 0.2 to 3 s.
// Products and triangular solves, which meet rarely, always use all threads.
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

// Below this order a reduction takes about as long as a search.
bool searches(int64_t n, int64_t count) {
  return n >= kThreadedOrder && LowestEigenpairs::suits(n, count);
}

// LAPACK's blocked routines take panels of at most this many columns.
constexpr size_t kLapackBlock = 64;

// Inverse iteration leaves vectors whose eigenvalues are just too far apart to be reorthogonalized at an angle of about 1e-12
// from a right one.
void orthonormalize(double* vectors, int count, int n) {
  for (int i = 0; i < count; ++i) {
    double* row = vectors + static_cast<size_t>(i) * static_cast<size_t>(n);
    for (const double* earlier = vectors; earlier < row; earlier += n) {
      cblas_daxpy(n, -cblas_ddot(n, row, 1, earlier, 1), earlier, 1, row, 1);
    }
    cblas_dscal(n, 1 / cblas_dnrm2(n, row, 1), row, 1);
  }
}

// The `count` lowest eigenpairs of a tridiagonal matrix: eigenvalues by bisection, vectors [count, n] by inverse iteration with
// reorthogonalization. LAPACK's newer dstemr is not used: it fails (info 22) on tight clusters such as those of glued Wilkinson
// matrices, and takes the eigenvalue of smaller magnitude of a 2 x 2 matrix for the smaller one (OpenBLAS 0.3.21).
void lowestTridiagonal(const double* diagonal, const double* offDiagonal, int n, int count, double* values, double* vectors) {
  const size_t size = static_cast<size_t>(n), wanted = static_cast<size_t>(count);
  std::vector<double> byBlock(size), found(wanted * size), work(5 * size);
  std::vector<int> block(size), split(size), failed(wanted), integers(3 * size);
  const int first = 1;
  const double unused = 0, finest = 2 * std::numeric_limits<double>::min();
  int matched = 0, splits = 0, info = 0;
  dstebz_("I", "B", &n, &unused, &unused, &first, &count, &finest, diagonal, offDiagonal, &matched, &splits, byBlock.data(),
          block.data(), split.data(), work.data(), integers.data(), &info, 1, 1);
  lapackSucceeded(info, "dstebz");
  lapackSucceeded(matched - count, "dstebz (eigenvalues too many)");
  dstein_(&n, diagonal, offDiagonal, &count, byBlock.data(), block.data(), split.data(), found.data(), &n, work.data(),
          integers.data(), failed.data(), &info);
  lapackSucceeded(info, "dstein");

  // They come block by block of a matrix that splits.
  std::vector<size_t> order(wanted);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return byBlock[x] < byBlock[y]; });
  for (size_t i = 0; i < wanted; ++i) {
    values[i] = byBlock[order[i]];
    std::copy_n(found.begin() + static_cast<int64_t>(order[i] * size), size, vectors + i * size);
  }
  orthonormalize(vectors, count, n);
}

}  // namespace

void CpuDevice::denseProduct(Transpose ta, const Matrix& a, Transpose tb, const Matrix& b, float alpha, bool accumulate,
                             const Matrix& c) {
  const auto sideOf = [](Transpose transpose) { return transpose == Transpose::yes ? CblasTrans : CblasNoTrans; };
  const int m = static_cast<int>(c.rows), n = static_cast<int>(c.cols),
            k = static_cast<int>(ta == Transpose::yes ? a.rows : a.cols);
  const double beta = accumulate ? 1 : 0;
  if (n == 1) {  // dgemm copies the matrix first, which takes longer than the product with one column
    const LapackThreads threads(std::max(m, k));  // dgemv's sums depend on their number
    cblas_dgemv(CblasRowMajor, sideOf(ta), static_cast<int>(a.rows), static_cast<int>(a.cols), alpha, a.as<double>(),
                static_cast<int>(a.stride), b.as<double>(), tb == Transpose::yes ? 1 : static_cast<int>(b.stride), beta,
                c.as<double>(), static_cast<int>(c.stride));
    return;
  }
  cblas_dgemm(CblasRowMajor, sideOf(ta), sideOf(tb), m, n, k, alpha, a.as<double>(), static_cast<int>(a.stride), b.as<double>(),
              static_cast<int>(b.stride), beta, c.as<double>(), static_cast<int>(c.stride));
}

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
  mirrorLower(a, n);
}

void CpuDevice::mirrorLower(double* a, int64_t n) {
  const int64_t blocks = (n + kMirrorBlock - 1) / kMirrorBlock;
#pragma omp parallel for schedule(dynamic) num_threads(threads_)
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

// Below the order from which LAPACK's own threads pay, each piece of work is better off on a thread of its own.
int CpuDevice::concurrency(int64_t order) const {
  return order < kThreadedOrder ? threads_ : 1;
}

void CpuDevice::concurrently(int64_t order, int64_t items, const std::function<void(int64_t, int)>& body) {
  std::mutex mutex;
  std::exception_ptr failure;
  std::atomic<int64_t> failed{items};
#pragma omp parallel for num_threads(concurrency(order)) schedule(dynamic, 1)
  for (int64_t item = 0; item < items; ++item) {
    if (item > failed) continue;
    try {
      body(item, omp_get_thread_num());
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (item < failed) {
        failed = item;
        failure = std::current_exception();
      }
    }
  }
  if (failure) std::rethrow_exception(failure);
}

void CpuDevice::symmetricProduct(const double* a, int64_t n, int64_t m, double alpha, double beta, double* c) {
  const int order = static_cast<int>(n), inner = static_cast<int>(m);
  cblas_dsyrk(CblasRowMajor, CblasLower, CblasNoTrans, order, inner, alpha, a, inner, beta, c, order);
  mirrorLower(c, n);
}

// The arrays of the search, or of what follows where it finds nothing; the Cholesky routines work in place.
size_t CpuDevice::denseWorkspaceBytes(int64_t n, int64_t count) const {
  if (count == 0) return 0;
  if (searches(n, count)) return LowestEigenpairs::bytes(n, count);
  const size_t size = static_cast<size_t>(n), wanted = static_cast<size_t>(count);
  const size_t doubles = (3 + 1 + wanted + 5) * size + kLapackBlock * (size + wanted + kLapackBlock);
  const size_t integers = 5 * size + wanted;
  return doubles * sizeof(double) + integers * sizeof(int) + wanted * sizeof(size_t);
}

// Where no search serves: Householder reduction to tridiagonal form, the wanted eigenpairs of that, and back.
void CpuDevice::lowestEigenpairs(double* a, int64_t n, int64_t count, double* values, double* vectors) {
  if (count < 1 || count > n) throw Error(code::invalidArgument, "lowestEigenpairs: count must lie between 1 and the order");
  if (searches(n, count) && LowestEigenpairs(*this, a, n, count).find(values, vectors)) return;
  const LapackThreads threads(n);
  const int order = static_cast<int>(n), wanted = static_cast<int>(count);
  const size_t size = static_cast<size_t>(n);
  std::vector<double> diagonal(size), offDiagonal(size), tau(size),
      work(kLapackBlock * (size + static_cast<size_t>(count) + kLapackBlock));
  const int workSize = static_cast<int>(work.size());
  int info = 0;
  dsytrd_("L", &order, a, &order, diagonal.data(), offDiagonal.data(), tau.data(), work.data(), &workSize, &info, 1);
  lapackSucceeded(info, "dsytrd");
  lowestTridiagonal(diagonal.data(), offDiagonal.data(), order, wanted, values, vectors);
  dormtr_("L", "L", "N", &order, &wanted, a, &order, tau.data(), vectors, &order, work.data(), &workSize, &info, 1, 1, 1);
  lapackSucceeded(info, "dormtr");
}

}  // namespace lora_da::cpu
