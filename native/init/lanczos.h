// The largest eigenvalue of a symmetric positive semidefinite matrix by Lanczos' method.
#pragma once

#include "init/workspace.h"

namespace lora_da {

// matrix [n, n] on the device. The relative error of the result is at most `tolerance`, by the residual bound, or the Krylov
// space is exhausted. The start vector is random but always the same.
double largestEigenvalue(InitializationWorkspace& workspace, const double* matrix, int64_t n, double tolerance);

}  // namespace lora_da
