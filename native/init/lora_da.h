// LoRA-DA (Zhang et al., ICML 2026, arXiv 2510.24561).
#pragma once

#include "init/initializer.h"

namespace lora_da {

void initializeLoraDa(const InitializationInput& input, InitializationWorkspace& workspace, Factors& factors,
                      ModuleReport& report);
size_t loraDaWorkspaceBytes(int64_t out, int64_t in, int64_t rank);

}  // namespace lora_da
