// LoRA-DA: data-aware initialization by asymptotic analysis (Zhang et al., ICML 2026, arXiv 2510.24561).
//
//   Zd    = Z + damping I                                                          [in, in]
//   yinv  = 1 / (ydiag + outputDamping)                                            [out]
//   delta = -Zd^-1 G^T diag(yinv) / sigma                                          [in, out]
//   omega = -biasWeight delta delta^T + varianceWeight (sum yinv / N) / sigma^2 Zd^-1
//   A0    = eigenvectors of omega's `rank` smallest eigenvalues, B0 = A0^T delta,  A = A0^T / sqrt(gamma), B = B0^T / sqrt(gamma)
//
// sigma, the largest singular value of the undivided delta, scales omega as a whole: A0 does not depend on it, B0 does.
// Everything is float64: ydiag and G may be 1e-9 and less, and the two terms of omega differ by many orders of magnitude.
#include "init/lora_da.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "core/error.h"
#include "init/finite.h"
#include "init/lanczos.h"

namespace lora_da {

namespace {

void requireUsable(const InitializationInput& input) {
  if (input.rank > input.in) {
    throw Error(code::invalidArgument, input.module + ": Expected rank of at most " + std::to_string(input.in) +
                                           ", the module's input width, but received " + std::to_string(input.rank));
  }
  if (!(input.options.population > 0)) {
    throw Error(code::invalidArgument,
                "Expected positive number for population but received " + std::to_string(input.options.population));
  }
}

constexpr double kSigmaTolerance = 1e-12;  // relative, of sigma^2

struct OutputWeights {
  std::vector<double> yinv;  // [out]
  double sum = 0;
  double medianOverDamping = 0;
};

OutputWeights outputWeights(const InitializationInput& input) {
  const double damping = input.options.outputDamping.value_or(input.options.damping);
  requireFinite(input.outputFactor, input.out, input.module, "the output factor ydiag");
  OutputWeights weights;
  weights.yinv.resize(static_cast<size_t>(input.out));
  for (int64_t i = 0; i < input.out; ++i) {
    const double damped = input.outputFactor[i] + damping;
    if (!(damped > 0)) {
      throw Error(code::invalidArgument,
                  input.module + ": output " + std::to_string(i) +
                      " has no gradient at all, so that ydiag cannot be inverted; set a positive outputDamping");
    }
    weights.yinv[i] = 1 / damped;
    weights.sum += weights.yinv[i];
  }
  std::vector<double> sorted(input.outputFactor, input.outputFactor + input.out);
  const size_t middle = sorted.size() / 2;
  std::nth_element(sorted.begin(), sorted.begin() + middle, sorted.end());
  double median = sorted[middle];
  if (sorted.size() % 2 == 0) median = (median + *std::max_element(sorted.begin(), sorted.begin() + middle)) / 2;
  weights.medianOverDamping = median / damping;
  return weights;
}

// delta [in, out], not yet divided by sigma.
double* solveDelta(const InitializationInput& input, const std::vector<double>& yinv, InitializationWorkspace& workspace) {
  const int64_t in = input.in, out = input.out;
  Device& device = workspace.device;
  requireFinite(device, {const_cast<float*>(input.gradient), DType::f32, out, in, in}, input.module, "the gradient G");
  std::vector<double> negated(yinv.size());
  std::transform(yinv.begin(), yinv.end(), negated.begin(), std::negate<double>());
  double* scale = workspace.outputScale.reserve(device, out, "LoRA-DA's output scale");
  device.upload(scale, negated.data(), negated.size() * sizeof(double));
  double* delta = workspace.delta.reserve(device, in * out, "LoRA-DA's delta");
  device.scaledTranspose(input.gradient, out, in, scale, delta);
  input.inputMoment->solve(workspace, delta, out);
  return delta;
}

// The largest singular value of delta, from the smaller of its Gram matrices; `outer` is delta delta^T.
double largestSingularValue(const double* delta, int64_t in, int64_t out, const double* outer,
                            InitializationWorkspace& workspace) {
  if (out >= in) return std::sqrt(largestEigenvalue(workspace, outer, in, kSigmaTolerance));
  double* inner = workspace.gram.reserve(workspace.device, out * out, "LoRA-DA's Gram matrix");
  const Matrix view = denseView(delta, in, out);
  workspace.device.matmul(Transpose::yes, view, Transpose::no, view, 1.0f, false, denseView(inner, out, out));
  return std::sqrt(largestEigenvalue(workspace, inner, out, kSigmaTolerance));
}

void requireDetermined(const InitializationInput& input, double sigma, double variance) {
  if (!std::isfinite(sigma) || !std::isfinite(variance)) {
    throw Error(code::nonFinite, input.module + ": delta leaves the range of float64; set a larger damping or outputDamping");
  }
  if (sigma == 0 && variance == 0) {
    throw Error(code::invalidArgument,
                input.module +
                    ": the gradient is zero, so that without a variance term nothing determines the start; "
                    "set a positive varianceWeight, or leave the module out");
  }
}

// The sign of each row of vectors [count, n] for which its entry of largest magnitude is positive.
std::vector<double> canonicalSigns(const std::vector<double>& vectors, int64_t count, int64_t n) {
  std::vector<double> signs(static_cast<size_t>(count));
  for (int64_t k = 0; k < count; ++k) {
    const double* row = vectors.data() + k * n;
    const double* pivot = std::max_element(row, row + n, [](double x, double y) { return std::abs(x) < std::abs(y); });
    signs[k] = *pivot < 0 ? -1.0 : 1.0;
  }
  return signs;
}

// Reads A0 and B0 = A0^T delta back, [rank, in] and [rank, out], with canonical signs and divided by sqrt(gamma).
void readFactors(const InitializationInput& input, const double* vectors, const double* delta, double sigma,
                 InitializationWorkspace& workspace, Factors& factors) {
  const int64_t in = input.in, out = input.out, rank = input.rank;
  Device& device = workspace.device;
  double* projected = workspace.projected.reserve(device, rank * out, "LoRA-DA's B");
  device.matmul(Transpose::no, denseView(vectors, rank, in), Transpose::no, denseView(delta, in, out), 1.0f, false,
                denseView(projected, rank, out));
  std::vector<double> a(static_cast<size_t>(rank * in)), b(static_cast<size_t>(rank * out));
  device.download(a.data(), vectors, a.size() * sizeof(double));
  device.download(b.data(), projected, b.size() * sizeof(double));
  device.synchronize();

  const std::vector<double> signs = canonicalSigns(a, rank, in);
  const double scale = 1 / std::sqrt(input.options.gamma);
  factors.a.resize(a.size());
  factors.b.resize(b.size());
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t i = 0; i < in; ++i) factors.a[k * in + i] = static_cast<float>(scale * signs[k] * a[k * in + i]);
    for (int64_t j = 0; j < out; ++j) factors.b[j * rank + k] = static_cast<float>(scale * signs[k] * b[k * out + j] / sigma);
  }
}

}  // namespace

void initializeLoraDa(const InitializationInput& input, InitializationWorkspace& workspace, Factors& factors,
                      ModuleReport& report) {
  const int64_t in = input.in, out = input.out, rank = input.rank;
  const InitializationOptions& options = input.options;
  requireUsable(input);
  Device& device = workspace.device;
  const OutputWeights weights = outputWeights(input);
  input.inputMoment->factor(workspace, options.damping);
  const double* delta = solveDelta(input, weights.yinv, workspace);
  const DampedInverse& inverse = input.inputMoment->invert(workspace);

  double* omega = workspace.omega.reserve(device, in * in, "LoRA-DA's omega");
  device.symmetricProduct(delta, in, out, 1, 0, omega);
  const double sigma = options.normalizeDelta ? largestSingularValue(delta, in, out, omega, workspace) : 1;
  // Without a gradient B is zero, and A follows the variance term, whose scale does not matter.
  const double divisor = sigma > 0 ? sigma : 1;
  const double variance = options.varianceWeight * (weights.sum / options.population) / (divisor * divisor);
  requireDetermined(input, sigma, variance);
  device.blend(omega, -options.biasWeight / (divisor * divisor), inverse.values, variance, in * in);

  const int64_t count = std::min(rank + 1, in);
  double* values = workspace.values.reserve(device, count, "LoRA-DA's eigenvalues");
  double* vectors = workspace.vectors.reserve(device, count * in, "LoRA-DA's eigenvectors");
  device.lowestEigenpairs(omega, in, count, values, vectors);

  report = ModuleReport{};
  report.module = input.module;
  report.sigma = sigma;
  report.conditionNumber = inverse.conditionNumber;
  report.medianOutputOverDamping = weights.medianOverDamping;
  report.eigenvalues.resize(static_cast<size_t>(count));
  device.download(report.eigenvalues.data(), values, report.eigenvalues.size() * sizeof(double));
  readFactors(input, vectors, delta, divisor, workspace, factors);

  // omega's largest eigenvalue is at most that of its variance term (Weyl), which costs nothing to know.
  const double largest = std::max(std::abs(report.eigenvalues.front()), variance * inverse.norm);
  report.gap = rank < in ? report.eigenvalues[rank] - report.eigenvalues[rank - 1] : std::numeric_limits<double>::infinity();
  report.relativeGap = report.gap / largest;
}

size_t loraDaWorkspaceBytes(int64_t out, int64_t in, int64_t rank) {
  const int64_t delta = in * out, omega = in * in, gram = out < in ? out * out : 0;
  const int64_t factors = 2 * (rank + 1) * (in + out);  // on the device and on the host
  return static_cast<size_t>(delta + omega + gram + factors) * sizeof(double);
}

}  // namespace lora_da
