// Lanczos with full reorthogonalization (Parlett, The Symmetric Eigenvalue Problem, 1998, ch. 13). The basis lives on the host:
// it is k x n for the few dozen steps k that are needed, and only matrix times vector runs on the device.
#include "init/lanczos.h"

#include <cmath>
#include <limits>
#include <vector>

#include "core/error.h"
#include "core/random.h"

namespace lora_da {

namespace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr int kStepsBetweenTests = 4;

double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// Implicit QL on a symmetric tridiagonal matrix, carrying only the last row of its eigenvectors (Golub & Welsch 1969):
// diagonal [k] becomes the eigenvalues, unordered; lastRow [k] the last component of each eigenvector.
void tridiagonalEigenvalues(std::vector<double>& diagonal, std::vector<double> offDiagonal, std::vector<double>& lastRow) {
  const int k = static_cast<int>(diagonal.size());
  offDiagonal.resize(static_cast<size_t>(k), 0.0);
  lastRow.assign(static_cast<size_t>(k), 0.0);
  lastRow.back() = 1;
  for (int l = 0; l < k; ++l) {
    for (int sweep = 0;; ++sweep) {
      int m = l;
      while (m < k - 1 && std::abs(offDiagonal[m]) > kEpsilon * (std::abs(diagonal[m]) + std::abs(diagonal[m + 1]))) ++m;
      if (m == l) break;
      if (sweep == 60) throw Error(code::internal, "the tridiagonal eigenvalue iteration did not converge");
      double g = (diagonal[l + 1] - diagonal[l]) / (2 * offDiagonal[l]);
      double r = std::hypot(g, 1.0);
      g = diagonal[m] - diagonal[l] + offDiagonal[l] / (g + std::copysign(r, g));
      double s = 1, c = 1, p = 0;
      int i = m - 1;
      for (; i >= l; --i) {
        const double f = s * offDiagonal[i], b = c * offDiagonal[i];
        r = std::hypot(f, g);
        offDiagonal[i + 1] = r;
        if (r == 0) {
          diagonal[i + 1] -= p;
          offDiagonal[m] = 0;
          break;
        }
        s = f / r;
        c = g / r;
        g = diagonal[i + 1] - p;
        r = (diagonal[i] - g) * s + 2 * c * b;
        p = s * r;
        diagonal[i + 1] = g + p;
        g = c * r - b;
        const double upper = lastRow[i + 1];
        lastRow[i + 1] = s * lastRow[i] + c * upper;
        lastRow[i] = c * lastRow[i] - s * upper;
      }
      if (r == 0 && i >= l) continue;
      diagonal[l] -= p;
      offDiagonal[l] = g;
      offDiagonal[m] = 0;
    }
  }
}

struct Ritz {
  double value = 0;  // the largest Ritz value
  double error = 0;  // bound on its distance from an eigenvalue
};

// The residual r of the largest Ritz pair bounds the error; once r is small beside the distance to the next Ritz value, so does
// r^2 over that distance (Kato & Temple; Parlett, sec. 10.1).
Ritz largestRitz(const std::vector<double>& diagonal, const std::vector<double>& offDiagonal, double beta) {
  std::vector<double> values = diagonal, lastRow;
  tridiagonalEigenvalues(values, offDiagonal, lastRow);
  size_t top = 0;
  for (size_t i = 1; i < values.size(); ++i) {
    if (values[i] > values[top]) top = i;
  }
  double next = -std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < values.size(); ++i) {
    if (i != top) next = std::max(next, values[i]);
  }
  const double residual = beta * std::abs(lastRow[top]);
  const double distance = values[top] - next;
  return {values[top], residual < 0.01 * distance ? residual * (residual / distance) : residual};
}

}  // namespace

double largestEigenvalue(InitializationWorkspace& workspace, const double* matrix, int64_t n, double tolerance) {
  Device& device = workspace.device;
  double* x = workspace.vectorIn.reserve(device, n, "a Lanczos vector");
  double* y = workspace.vectorOut.reserve(device, n, "a Lanczos vector");
  const size_t bytes = static_cast<size_t>(n) * sizeof(double);

  std::vector<std::vector<double>> basis(1, std::vector<double>(static_cast<size_t>(n)));
  Random random(0, "Lanczos start");
  for (double& value : basis[0]) value = random.normal();
  const double startNorm = std::sqrt(dot(basis[0].data(), basis[0].data(), n));
  for (double& value : basis[0]) value /= startNorm;

  std::vector<double> diagonal, offDiagonal, w(static_cast<size_t>(n));
  double scale = 0;  // the largest coefficient so far, of the matrix' own magnitude
  for (;;) {
    const std::vector<double>& current = basis.back();
    device.upload(x, current.data(), bytes);
    device.matmul(Transpose::no, denseView(matrix, n, n), Transpose::no, denseView(x, n, 1), 1.0f, false, denseView(y, n, 1));
    device.download(w.data(), y, bytes);
    device.synchronize();
    diagonal.push_back(dot(w.data(), current.data(), n));
    for (int pass = 0; pass < 2; ++pass) {  // twice is enough (Kahan & Parlett)
      for (const std::vector<double>& vector : basis) {
        const double overlap = dot(w.data(), vector.data(), n);
        for (int64_t i = 0; i < n; ++i) w[i] -= overlap * vector[i];
      }
    }
    const double beta = std::sqrt(dot(w.data(), w.data(), n));
    scale = std::max({scale, std::abs(diagonal.back()), beta});
    const int64_t steps = static_cast<int64_t>(diagonal.size());
    const bool exhausted = steps == n || beta <= kEpsilon * scale;
    if (exhausted || steps % kStepsBetweenTests == 0) {
      const Ritz ritz = largestRitz(diagonal, offDiagonal, exhausted ? 0 : beta);
      if (exhausted || ritz.error <= tolerance * ritz.value) return std::max(ritz.value, 0.0);
    }
    offDiagonal.push_back(beta);
    for (double& value : w) value /= beta;
    basis.push_back(w);
  }
}

}  // namespace lora_da
