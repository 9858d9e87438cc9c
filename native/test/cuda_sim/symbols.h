// Names of this process's functions, internal ones too.
#pragma once

#include <string>

namespace cuda_sim {

std::string demangled(const std::string& name);
// The demangled name of the function that begins there; "kernel" when it has none.
std::string functionName(const void* function);

}  // namespace cuda_sim
