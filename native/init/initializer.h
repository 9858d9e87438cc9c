// The table of adapter initializations. A row says what statistics it needs and fills the factors of one module; a new method is
// one more file with one more row in initializer.cpp.
//
// A caller walks the groups of modules that read the same input:
//   InitializationWorkspace workspace(device);   InputMoment moment;
//   per group:   moment.reset(z, in, modules, name);      (where the row needs the input moment)
//   per module:  row.initialize(input, workspace, factors, report);
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "core/random.h"
#include "init/input_moment.h"
#include "init/workspace.h"

namespace lora_da {

// The options of all methods; each reads those that concern it.
struct InitializationOptions {
  double damping = 1e-6;                // added to the diagonal of Z
  std::optional<double> outputDamping;  // added to ydiag; absent: damping
  double varianceWeight = 0.03;         // weight of the sampling-noise term
  double biasWeight = 1;                // weight of the term that follows the estimated displacement
  double gamma = 1024;                  // A and B are each divided by sqrt(gamma)
  double population = 0;                // N, number of training samples that the noise is estimated for
  bool normalizeDelta = true;           // divide the displacement by its largest singular value
  uint64_t seed = 42;
};

struct InitializationInput {
  std::string module;
  int64_t out = 0, in = 0, rank = 0;
  const float* gradient = nullptr;       // G [out, in], device memory
  InputMoment* inputMoment = nullptr;    // Z, shared by the modules of a group
  const double* outputFactor = nullptr;  // ydiag [out], host memory
  InitializationOptions options;
};

// PEFT's orientation: update = scaling * B A.
struct Factors {
  std::vector<float> a;  // [rank, in]
  std::vector<float> b;  // [out, rank]
};

// What a user needs to judge whether the statistics determine the result. Methods without statistics leave the numbers at NaN.
struct ModuleReport {
  static constexpr double notComputed = std::numeric_limits<double>::quiet_NaN();
  std::string module;
  double conditionNumber = notComputed;          // of Zd = Z + damping I, estimated from below, usually within a few per cent
  double medianOutputOverDamping = notComputed;  // median(ydiag) / outputDamping; below 1, damping decides
  double sigma = notComputed;                    // what delta was divided by: its largest singular value; 1 when not normalized
  double gap = notComputed;                      // eigenvalue r+1 minus eigenvalue r of omega; infinite when rank = in
  double relativeGap = notComputed;              // gap over the largest magnitude that an eigenvalue of omega can have
  std::vector<double> eigenvalues;               // the rank + 1 smallest of omega, ascending (rank, when rank = in)
};

struct InitializerNeeds {
  bool gradient = false;
  bool inputMoment = false;
  bool outputFactor = false;
};

struct Initializer {
  const char* name;
  InitializerNeeds needs;
  void (*initialize)(const InitializationInput& input, InitializationWorkspace& workspace, Factors& factors,
                     ModuleReport& report);
  // Bytes that a module takes of the workspace (null: none worth planning for), beside its group's statistics and their inverse.
  size_t (*workspaceBytes)(int64_t out, int64_t in, int64_t rank) = nullptr;
};

const std::vector<Initializer>& initializers();

// Throws Error(invalidArgument) that lists the names there are.
const Initializer& findInitializer(const std::string& name);

}  // namespace lora_da
