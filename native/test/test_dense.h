// Plain dense algebra in extended precision, against which the device's and the initializations' is compared.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

namespace lora_da::test {

using Real = long double;

// Row-major [rows, cols].
struct Dense {
  int64_t rows = 0, cols = 0;
  std::vector<Real> data;

  Dense(int64_t r, int64_t c) : rows(r), cols(c), data(static_cast<size_t>(r * c), Real(0)) {}
  template <class T>
  Dense(int64_t r, int64_t c, const T* values) : rows(r), cols(c), data(values, values + r * c) {}
  Real& operator()(int64_t i, int64_t j) { return data[static_cast<size_t>(i * cols + j)]; }
  Real operator()(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * cols + j)]; }
  std::vector<double> toDouble() const { return {data.begin(), data.end()}; }
};

inline Dense transpose(const Dense& a) {
  Dense t(a.cols, a.rows);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < a.cols; ++j) t(j, i) = a(i, j);
  }
  return t;
}

inline Dense product(const Dense& a, const Dense& b) {
  Dense c(a.rows, b.cols);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t k = 0; k < a.cols; ++k) {
      for (int64_t j = 0; j < b.cols; ++j) c(i, j) += a(i, k) * b(k, j);
    }
  }
  return c;
}

// scaleA a + scaleB b
inline Dense sum(Real scaleA, const Dense& a, Real scaleB, const Dense& b) {
  Dense c(a.rows, a.cols);
  for (size_t i = 0; i < c.data.size(); ++i) c.data[i] = scaleA * a.data[i] + scaleB * b.data[i];
  return c;
}

// What a device is given of it.
inline Dense roundedToDouble(Dense a) {
  for (Real& x : a.data) x = static_cast<double>(x);
  return a;
}

inline double norm(const Dense& a) {
  Real total = 0;
  for (const Real x : a.data) total += x * x;
  return static_cast<double>(std::sqrt(total));
}

inline double difference(const Dense& a, const Dense& b) {
  return norm(sum(1, a, -1, b));
}

inline Dense identity(int64_t n) {
  Dense eye(n, n);
  for (int64_t i = 0; i < n; ++i) eye(i, i) = 1;
  return eye;
}

inline Dense randomMatrix(int64_t rows, int64_t cols, std::mt19937_64& random, double scale = 1) {
  std::normal_distribution<double> normal(0, scale);
  Dense a(rows, cols);
  for (Real& x : a.data) x = normal(random);
  return a;
}

// Rows made orthonormal one after the other.
inline Dense orthonormalRows(Dense a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t pass = 0; pass < 2 * i; ++pass) {
      Real overlap = 0;
      for (int64_t k = 0; k < a.cols; ++k) overlap += a(i, k) * a(pass % i, k);
      for (int64_t k = 0; k < a.cols; ++k) a(i, k) -= overlap * a(pass % i, k);
    }
    Real square = 0;
    for (int64_t k = 0; k < a.cols; ++k) square += a(i, k) * a(i, k);
    for (int64_t k = 0; k < a.cols; ++k) a(i, k) /= std::sqrt(square);
  }
  return a;
}

// Gauss and Jordan without pivoting: for positive definite matrices.
inline Dense inverse(Dense a) {
  const int64_t n = a.rows;
  Dense result = identity(n);
  for (int64_t k = 0; k < n; ++k) {
    const Real pivot = a(k, k);
    for (int64_t j = 0; j < n; ++j) a(k, j) /= pivot, result(k, j) /= pivot;
    for (int64_t i = 0; i < n; ++i) {
      if (i == k) continue;
      const Real factor = a(i, k);
      for (int64_t j = 0; j < n; ++j) a(i, j) -= factor * a(k, j), result(i, j) -= factor * result(k, j);
    }
  }
  return result;
}

struct Eigenpairs {
  std::vector<Real> values;  // ascending
  Dense vectors;             // a row each
};

// Cyclic Jacobi rotations: slow, simple, and accurate even for graded matrices.
inline Eigenpairs eigenpairs(Dense a) {
  const int64_t n = a.rows;
  Dense v = identity(n);
  for (int sweep = 0; sweep < 60; ++sweep) {
    bool rotated = false;
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t q = p + 1; q < n; ++q) {
        if (std::abs(a(p, q)) <= Real(1e-19) * std::sqrt(std::abs(a(p, p) * a(q, q)))) continue;
        rotated = true;
        const Real theta = (a(q, q) - a(p, p)) / (2 * a(p, q));
        const Real t = std::copysign(Real(1), theta) / (std::abs(theta) + std::sqrt(theta * theta + 1));
        const Real c = 1 / std::sqrt(t * t + 1), s = t * c;
        for (int64_t k = 0; k < n; ++k) {
          const Real x = a(k, p), y = a(k, q);
          a(k, p) = c * x - s * y, a(k, q) = s * x + c * y;
        }
        for (int64_t k = 0; k < n; ++k) {
          const Real x = a(p, k), y = a(q, k);
          a(p, k) = c * x - s * y, a(q, k) = s * x + c * y;
          const Real vp = v(p, k), vq = v(q, k);
          v(p, k) = c * vp - s * vq, v(q, k) = s * vp + c * vq;
        }
      }
    }
    if (!rotated) break;
  }
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return a(x, x) < a(y, y); });
  Eigenpairs result{{}, Dense(n, n)};
  for (int64_t i = 0; i < n; ++i) {
    result.values.push_back(a(order[i], order[i]));
    for (int64_t k = 0; k < n; ++k) result.vectors(i, k) = v(order[i], k);
  }
  return result;
}

inline Dense firstRows(const Dense& a, int64_t count) {
  return Dense(count, a.cols, a.data.data());
}

// The sine of the largest angle between two row spaces, at most (Frobenius norm of what of b lies outside a).
inline double rowSpaceDistance(const Dense& a, const Dense& b) {
  const Dense p = orthonormalRows(a), q = orthonormalRows(b);
  return difference(q, product(product(q, transpose(p)), p));
}

}  // namespace lora_da::test
