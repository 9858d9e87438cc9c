// The input second moment Z of a group of modules that read the same input (q, k, v; gate, up), and the work on it that those
// modules share: it is factored and inverted once, at the first module that asks. A module asks in this order: factor, solve,
// invert.
#pragma once

#include <string>

#include "init/workspace.h"

namespace lora_da {

// The inverse of Zd = Z + damping I.
struct DampedInverse {
  const double* values = nullptr;  // [in, in] on the device
  double norm = 0;                 // its largest eigenvalue, estimated from below
  double conditionNumber = 0;      // of Zd in the 2-norm, estimated from below, usually within a few per cent
};

// At 8192 channels, an array of in x in is 0.5 GB: Zd and its factor take the place of Z, and so does the inverse where no other
// module of the group has to solve with the factor.
class InputMoment {
 public:
  // Starts a new group of `modules` modules. z [in, in] is device memory, of which the lower triangle is read and the whole is
  // overwritten; it must outlive the group's work. `module` names the group in errors.
  void reset(double* z, int64_t in, size_t modules, const std::string& module);

  // Throws Error(notPositiveDefinite) where Zd has no Cholesky factor, Error(nonFinite).
  void factor(InitializationWorkspace& workspace, double damping);
  // b [in, m] = Zd^-1 b.
  void solve(InitializationWorkspace& workspace, double* b, int64_t m) const;
  const DampedInverse& invert(InitializationWorkspace& workspace);

  int64_t size() const { return in_; }

 private:
  enum class State { moment, factor, inverse };

  double* z_ = nullptr;  // what state_ says; with several modules it stays the factor
  int64_t in_ = 0;
  size_t modules_ = 0;
  std::string module_;
  State state_ = State::moment;
  double norm_ = 0;  // largest eigenvalue of Zd
  DampedInverse result_;
  DeviceArray inverse_;
};

}  // namespace lora_da
