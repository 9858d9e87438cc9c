// Initializations that look at no data: PEFT's own.
#pragma once

#include "init/initializer.h"

namespace lora_da {

void initializeKaiming(const InitializationInput& input, InitializationWorkspace& workspace, Factors& factors,
                       ModuleReport& report);
void initializeGaussian(const InitializationInput& input, InitializationWorkspace& workspace, Factors& factors,
                        ModuleReport& report);
void initializeOrthogonal(const InitializationInput& input, InitializationWorkspace& workspace, Factors& factors,
                          ModuleReport& report);

}  // namespace lora_da
