// Scales. The diagonal of Z spans 1e-4 .. 1e4 in real models, which asks for equilibration, D Zd D with D = diag(Zd)^-1/2, before
// a factorization. Cholesky's needs none: a diagonal scaling by powers of two changes only exponents, in the factor, in the
// triangular solves and in the inverse, so the rounding errors are those of the equilibrated matrix already, and their size
// follows its condition number (van der Sluis 1969; Higham, Accuracy and Stability of Numerical Algorithms, 2002, sec. 10.1).
// init_test.cpp asserts it bit by bit. The damping is added in float64, where it is not lost below float32's rounding of Z.
#include "init/input_moment.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "core/error.h"
#include "init/finite.h"
#include "init/lanczos.h"

namespace lora_da {

namespace {

constexpr double kConditionTolerance = 1e-2;

// A row panel of the full symmetric Zd from the lower triangle of z; the upper one is read in blocks, a cache line at a time.
void fillDamped(const double* z, int64_t n, double damping, int64_t first, int64_t last, double* panel) {
  constexpr int64_t block = 32;
  for (int64_t i = first; i < last; ++i) {
    std::copy(z + i * n, z + i * n + i + 1, panel + (i - first) * n);
    panel[(i - first) * n + i] += damping;
  }
  for (int64_t column = first; column < n; column += block) {
    const int64_t end = std::min(n, column + block);
    for (int64_t j = column; j < end; ++j) {
      for (int64_t i = first; i < std::min(last, j); ++i) panel[(i - first) * n + j] = z[j * n + i];
    }
  }
}

[[noreturn]] void throwNotPositiveDefinite(const std::string& module, int64_t minor, int64_t in, double damping) {
  char text[64];
  std::snprintf(text, sizeof text, "%g", damping);
  throw Error(code::notPositiveDefinite, module +
                                             ": the input second moment Z + damping I is not positive definite with damping " +
                                             text + " (leading minor " + std::to_string(minor) + " of " + std::to_string(in) +
                                             "); set a larger damping, or use more samples so that Z has full rank");
}

}  // namespace

void InputMoment::reset(const double* z, int64_t in, const std::string& module) {
  z_ = z;
  in_ = in;
  module_ = module;
  prepared_ = false;
}

const DampedMoment& InputMoment::damped(InitializationWorkspace& workspace, double damping) {
  if (prepared_ && damping_ == damping) return result_;
  Device& device = workspace.device;
  const int64_t n = in_;
  for (int64_t i = 0; i < n; ++i) requireFinite(z_ + i * n, i + 1, module_, "the input second moment Z");

  double* factor = factor_.reserve(device, n * n, "the factor of an input second moment");
  double* inverse = inverse_.reserve(device, n * n, "the inverse of an input second moment");
  workspace.panels.write(factor, n, n,
                         [&](int64_t first, int64_t last, double* panel) { fillDamped(z_, n, damping, first, last, panel); });
  const double norm = largestEigenvalue(workspace, factor, n, kConditionTolerance);
  const int64_t minor = device.choleskyFactor(factor, n);
  if (minor != 0) throwNotPositiveDefinite(module_, minor, n, damping);
  workspace.panels.copy(inverse, factor, n, n);
  device.choleskyInverse(inverse, n);
  const double inverseNorm = largestEigenvalue(workspace, inverse, n, kConditionTolerance);

  result_ = {factor, inverse, inverseNorm, norm * inverseNorm};
  damping_ = damping;
  prepared_ = true;
  return result_;
}

}  // namespace lora_da
