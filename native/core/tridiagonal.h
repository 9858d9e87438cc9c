// Eigenvalues of a symmetric tridiagonal matrix by implicit QL with Wilkinson's shift (Golub & Van Loan, Matrix Computations,
// 2013, sec. 8.3), on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/error.h"

namespace lora_da {

namespace tridiagonal {

// One sweep over the unreduced block from `first` to `last`.
template <class Rotate>
void sweep(std::vector<double>& diagonal, std::vector<double>& offDiagonal, int64_t first, int64_t last, const Rotate& rotate) {
  const double half = (diagonal[first + 1] - diagonal[first]) / (2 * offDiagonal[first]);
  double g = diagonal[last] - diagonal[first] + offDiagonal[first] / (half + std::copysign(std::hypot(half, 1.0), half));
  double s = 1, c = 1, p = 0;
  for (int64_t i = last - 1; i >= first; --i) {
    const double f = s * offDiagonal[i], b = c * offDiagonal[i], r = std::hypot(f, g);
    offDiagonal[i + 1] = r;
    if (r == 0) {  // the block falls apart here
      diagonal[i + 1] -= p;
      offDiagonal[last] = 0;
      return;
    }
    s = f / r;
    c = g / r;
    g = diagonal[i + 1] - p;
    const double t = (diagonal[i] - g) * s + 2 * c * b;
    p = s * t;
    diagonal[i + 1] = g + p;
    g = c * t - b;
    rotate(i, c, s);
  }
  diagonal[first] -= p;
  offDiagonal[first] = g;
  offDiagonal[last] = 0;
}

}  // namespace tridiagonal

// `diagonal` [n] becomes the eigenvalues, unordered, to rounding errors of the largest. `offDiagonal` [n]: element i lies below
// diagonal element i, the last is not read; all are lost. rotate(i, c, s) turns elements i and i + 1 of a row x of the
// eigenvectors, which begin as the identity: (x_i, x_i+1) becomes (c x_i - s x_i+1, s x_i + c x_i+1). Throws Error(internal)
// where the iteration does not converge, which no finite matrix is known to bring about.
template <class Rotate>
void diagonalizeTridiagonal(std::vector<double>& diagonal, std::vector<double>& offDiagonal, const Rotate& rotate) {
  constexpr double epsilon = std::numeric_limits<double>::epsilon();
  constexpr int mostSweeps = 60;  // for one eigenvalue; two or three are usual
  const auto n = static_cast<int64_t>(diagonal.size());
  // An element below the diagonal counts as zero beside the whole matrix, not beside its neighbours: where these are small,
  // rounding puts it back.
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::abs(diagonal[i]) + (i < n - 1 ? std::abs(offDiagonal[i]) : 0));
  }
  for (int64_t first = 0; first < n; ++first) {
    for (int sweeps = 0;; ++sweeps) {
      int64_t last = first;
      while (last < n - 1 && std::abs(offDiagonal[last]) > epsilon * largest) ++last;
      if (last == first) break;
      if (sweeps == mostSweeps) throw Error(code::internal, "the eigenvalue iteration of a tridiagonal matrix did not converge");
      tridiagonal::sweep(diagonal, offDiagonal, first, last, rotate);
    }
  }
}

}  // namespace lora_da
