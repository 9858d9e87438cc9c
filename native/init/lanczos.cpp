// Lanczos with full reorthogonalization (Parlett, The Symmetric Eigenvalue Problem, 1998, ch. 13). With the basis V [k, n] and
// its last row v, a step takes
//   w = A v;   twice: w -= V^T (V w);   beta = |w|;   the next row of V = w / beta
// on the device, and the diagonal entry v w and beta come to the host, where the tridiagonal matrix is.
#include "init/lanczos.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "core/random.h"
#include "core/tridiagonal.h"

namespace lora_da {

namespace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr int kStepsBetweenTests = 4;
constexpr const char* kBasisPurpose = "Lanczos vectors";

// diagonal [k] becomes the eigenvalues, unordered; lastRow [k] the last component of each eigenvector, all of them that is needed
// (Golub & Welsch 1969).
void tridiagonalEigenvalues(std::vector<double>& diagonal, std::vector<double> offDiagonal, std::vector<double>& lastRow) {
  offDiagonal.resize(diagonal.size(), 0.0);
  lastRow.assign(diagonal.size(), 0.0);
  lastRow.back() = 1;
  diagonalizeTridiagonal(diagonal, offDiagonal, [&](int64_t i, double c, double s) {
    const double lower = lastRow[i], upper = lastRow[i + 1];
    lastRow[i + 1] = s * lower + c * upper;
    lastRow[i] = c * lower - s * upper;
  });
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

// Always the same random vector [n] of norm 1, as the first row of V.
void writeStart(InitializationWorkspace& workspace, int64_t n) {
  std::vector<double> start(static_cast<size_t>(n));
  Random random(0, "Lanczos start");
  for (double& value : start) value = random.normal();
  const double norm = std::sqrt(std::inner_product(start.begin(), start.end(), start.begin(), 0.0));
  for (double& value : start) value /= norm;
  double* basis = workspace.krylov.reserve(workspace.device, n, kBasisPurpose);
  workspace.device.upload(basis, start.data(), start.size() * sizeof(double));
}

struct Step {
  double diagonal = 0;
  double beta = 0;
};

// The step from row k - 1 of V to row k, which is not yet divided by beta.
Step advance(InitializationWorkspace& workspace, const double* matrix, int64_t n, int64_t k) {
  Device& device = workspace.device;
  double* basis = workspace.krylov.extend(device, (k + 1) * n, kBasisPurpose);
  // V w of the second pass, V w of the first, whose last element is the diagonal entry, and beta^2 after it.
  double* second = workspace.coefficients.reserve(device, 2 * k + 1, "Lanczos coefficients");
  double *first = second + k, *square = first + k;
  const Matrix v = denseView(basis, k, n), last = denseView(basis + (k - 1) * n, n, 1), w = denseView(basis + k * n, n, 1);
  device.matmul(Transpose::no, denseView(matrix, n, n), Transpose::no, last, 1.0f, false, w);
  for (double* overlaps : {first, second}) {  // twice is enough (Giraud, Langou & Rozloznik 2005)
    device.matmul(Transpose::no, v, Transpose::no, w, 1.0f, false, denseView(overlaps, k, 1));
    device.matmul(Transpose::yes, v, Transpose::no, denseView(overlaps, k, 1), -1.0f, true, w);
  }
  device.matmul(Transpose::yes, w, Transpose::no, w, 1.0f, false, denseView(square, 1, 1));
  double numbers[2];
  device.download(numbers, square - 1, sizeof numbers);
  device.synchronize();
  return {numbers[0], std::sqrt(numbers[1])};
}

}  // namespace

double largestEigenvalue(InitializationWorkspace& workspace, const double* matrix, int64_t n, double tolerance) {
  writeStart(workspace, n);
  std::vector<double> diagonal, offDiagonal;
  double scale = 0;  // the largest coefficient so far, of the matrix' own magnitude
  for (int64_t steps = 1;; ++steps) {
    const auto [entry, beta] = advance(workspace, matrix, n, steps);
    diagonal.push_back(entry);
    scale = std::max({scale, std::abs(entry), beta});
    const bool exhausted = steps == n || beta <= kEpsilon * scale;
    if (exhausted || steps % kStepsBetweenTests == 0) {
      const Ritz ritz = largestRitz(diagonal, offDiagonal, exhausted ? 0 : beta);
      if (exhausted || ritz.error <= tolerance * ritz.value) return std::max(ritz.value, 0.0);
    }
    offDiagonal.push_back(beta);
    workspace.device.scale(denseView(workspace.krylov.get() + steps * n, 1, n), 1 / beta);
  }
}

}  // namespace lora_da
