#include "core/symmetric_eigenpairs.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/tridiagonal.h"

namespace lora_da {

namespace {

// Four sums side by side, so that additions need not wait for one another.
double dot(const double* x, const double* y, int64_t count) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int64_t lane = 0; lane < 4; ++lane) sums[lane] += x[i + lane] * y[i + lane];
  }
  for (; i < count; ++i) sums[0] += x[i] * y[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// y += factor x
void add(double factor, const double* x, double* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += factor * x[i];
}

// The reflector I - scale v v^T that takes x [count] to a multiple of the first unit vector; v, whose first element is 1, takes
// the place of x. Returns the multiple.
double reflect(double* x, int64_t count, double& scale) {
  double largest = 0;  // so that no square leaves the range of float64
  for (int64_t i = 1; i < count; ++i) largest = std::max(largest, std::abs(x[i]));
  const double first = x[0];
  x[0] = 1;
  scale = 0;
  if (largest == 0) return first;
  largest = std::max(largest, std::abs(first));
  double square = 0;
  for (int64_t i = 1; i < count; ++i) square += (x[i] / largest) * (x[i] / largest);
  const double start = first / largest, length = std::copysign(std::sqrt(start * start + square), start);
  for (int64_t i = 1; i < count; ++i) x[i] /= largest * (start + length);
  scale = (start + length) / length;
  return -length * largest;
}

// Reduces a [n, n], full, to tridiagonal form Q^T a Q: diagonal [n] and offDiagonal [n], element i below diagonal element i. The
// reflectors that Q is a product of take the place of a: that of column k lies below its diagonal.
std::vector<double> tridiagonalize(std::vector<double>& a, int64_t n, std::vector<double>& diagonal,
                                   std::vector<double>& offDiagonal) {
  std::vector<double> scales(static_cast<size_t>(n), 0.0), product(static_cast<size_t>(n));
  for (int64_t k = 0; k < n; ++k) {
    diagonal[k] = a[k * n + k];
    const int64_t rest = n - 1 - k;
    if (rest == 0) break;
    double* v = &a[k * n + k + 1];
    offDiagonal[k] = reflect(v, rest, scales[k]);
    if (scales[k] == 0) continue;
    // What is left, b, becomes b - v w^T - w v^T with w = p - (scale / 2) (p^T v) v and p = scale b v.
    double* w = product.data();
    double* b = &a[(k + 1) * n + k + 1];
    std::fill_n(w, rest, 0.0);
    for (int64_t j = 0; j < rest; ++j) add(scales[k] * v[j], b + j * n, w, rest);
    add(-0.5 * scales[k] * dot(w, v, rest), v, w, rest);
    for (int64_t j = 0; j < rest; ++j) {
      for (int64_t i = 0; i < rest; ++i) b[j * n + i] -= v[i] * w[j] + w[i] * v[j];
    }
  }
  return scales;
}

std::vector<double> productOfReflectors(const std::vector<double>& a, const std::vector<double>& scales, int64_t n) {
  std::vector<double> q(static_cast<size_t>(n * n), 0.0);
  for (int64_t i = 0; i < n; ++i) q[i * n + i] = 1;
  for (int64_t k = n - 2; k >= 0; --k) {
    const double* v = &a[k * n + k + 1];
    const int64_t rest = n - 1 - k;
    for (int64_t j = k + 1; j < n; ++j) {
      double* column = &q[j * n + k + 1];
      add(-scales[k] * dot(v, column, rest), v, column, rest);
    }
  }
  return q;
}

// `diagonal` becomes the eigenvalues, unordered; each column of `vectors` [n, n] is turned with its eigenvalue.
void diagonalize(std::vector<double>& diagonal, std::vector<double>& offDiagonal, std::vector<double>& vectors, int64_t n) {
  diagonalizeTridiagonal(diagonal, offDiagonal, [&](int64_t i, double c, double s) {
    double *lower = &vectors[i * n], *upper = lower + n;
    for (int64_t k = 0; k < n; ++k) {
      const double x = lower[k], y = upper[k];
      upper[k] = s * x + c * y;
      lower[k] = c * x - s * y;
    }
  });
}

}  // namespace

SymmetricEigenpairs symmetricEigenpairs(std::vector<double> matrix, int64_t n) {
  for (int64_t column = 0; column < n; ++column) {
    for (int64_t row = column + 1; row < n; ++row) matrix[row * n + column] = matrix[column * n + row];
  }
  SymmetricEigenpairs pairs;
  std::vector<double> offDiagonal(static_cast<size_t>(n), 0.0);
  pairs.values.resize(static_cast<size_t>(n));
  const std::vector<double> scales = tridiagonalize(matrix, n, pairs.values, offDiagonal);
  pairs.vectors = productOfReflectors(matrix, scales, n);
  diagonalize(pairs.values, offDiagonal, pairs.vectors, n);
  for (int64_t i = 0; i < n; ++i) {
    const auto lowest = std::min_element(pairs.values.begin() + i, pairs.values.end()) - pairs.values.begin();
    if (lowest == i) continue;
    std::swap(pairs.values[i], pairs.values[lowest]);
    std::swap_ranges(&pairs.vectors[i * n], &pairs.vectors[i * n] + n, &pairs.vectors[lowest * n]);
  }
  return pairs;
}

}  // namespace lora_da
