// Scales. The diagonal of Z spans 1e-4 .. 1e4 in real models, which asks for equilibration, D Zd D with D = diag(Zd)^-1/2, before
// a factorization. Cholesky's needs none: a diagonal scaling by powers of two changes only exponents, in the factor, in the
// triangular solves and in the inverse, so the rounding errors are those of the equilibrated matrix already, and their size
// follows its condition number (van der Sluis 1969; Higham, Accuracy and Stability of Numerical Algorithms, 2002, sec. 10.1).
// init_test.cpp asserts it bit by bit. The damping is added in float64, where it is not lost below float32's rounding of Z.
#include "init/input_moment.h"

#include <cmath>
#include <cstdio>

#include "core/error.h"
#include "init/finite.h"
#include "init/lanczos.h"

namespace lora_da {

namespace {

constexpr double kConditionTolerance = 1e-2;

[[noreturn]] void throwNotPositiveDefinite(const std::string& module, int64_t minor, int64_t in, double damping) {
  char text[64];
  std::snprintf(text, sizeof text, "%g", damping);
  throw Error(code::notPositiveDefinite, module +
                                             ": the input second moment Z + damping I is not positive definite with damping " +
                                             text + " (leading minor " + std::to_string(minor) + " of " + std::to_string(in) +
                                             "); set a larger damping, or use more samples so that Z has full rank");
}

}  // namespace

void InputMoment::reset(double* z, int64_t in, size_t modules, const std::string& module) {
  z_ = z;
  in_ = in;
  modules_ = modules;
  module_ = module;
  state_ = State::moment;
}

void InputMoment::factor(InitializationWorkspace& workspace, double damping) {
  if (state_ != State::moment) return;
  Device& device = workspace.device;
  const int64_t n = in_;
  device.mirrorLower(z_, n);
  requireFinite(device, denseView(z_, n, n), module_, "the input second moment Z");
  device.addToDiagonal(z_, n, damping);
  norm_ = largestEigenvalue(workspace, z_, n, kConditionTolerance);
  const int64_t minor = device.choleskyFactor(z_, n);
  if (minor != 0) throwNotPositiveDefinite(module_, minor, n, damping);
  state_ = State::factor;
}

void InputMoment::solve(InitializationWorkspace& workspace, double* b, int64_t m) const {
  workspace.device.choleskySolve(z_, in_, b, m);
}

const DampedInverse& InputMoment::invert(InitializationWorkspace& workspace) {
  if (state_ == State::inverse) return result_;
  Device& device = workspace.device;
  double* inverse = z_;
  if (modules_ > 1) {
    inverse = inverse_.reserve(device, in_ * in_, "the inverse of an input second moment");
    device.copy(inverse, z_, static_cast<size_t>(in_ * in_) * sizeof(double));
  }
  device.choleskyInverse(inverse, in_);
  const double norm = largestEigenvalue(workspace, inverse, in_, kConditionTolerance);
  result_ = {inverse, norm, norm_ * norm};
  state_ = State::inverse;
  return result_;
}

}  // namespace lora_da
