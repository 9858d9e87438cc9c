// The input second moment Z of a group of modules that read the same input (q, k, v; gate, up), and the work on it that those
// modules share: it is factored and inverted once, at the first module that asks.
#pragma once

#include <string>

#include "init/workspace.h"

namespace lora_da {

// Zd = Z + damping I, prepared. Arrays are on the device.
struct DampedMoment {
  const double* factor = nullptr;   // [in, in], Cholesky factor in the lower triangle
  const double* inverse = nullptr;  // [in, in], Zd^-1
  double inverseNorm = 0;           // largest eigenvalue of Zd^-1, estimated from below
  double conditionNumber = 0;       // of Zd in the 2-norm, estimated from below, usually within a few per cent
};

class InputMoment {
 public:
  // Starts a new group; the buffers of the last one are used again. z [in, in], of which the lower triangle is read, is host
  // memory that must outlive the group's modules; `module` names the group in errors.
  void reset(const double* z, int64_t in, const std::string& module);

  const DampedMoment& damped(InitializationWorkspace& workspace, double damping);

  int64_t size() const { return in_; }

 private:
  const double* z_ = nullptr;
  int64_t in_ = 0;
  std::string module_;
  bool prepared_ = false;
  double damping_ = 0;
  DampedMoment result_;
  DeviceArray factor_, inverse_;
};

}  // namespace lora_da
