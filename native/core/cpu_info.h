// What the processor offers.
#pragma once

namespace lora_da {

// Physical cores that this process may use (affinity and cgroup quota respected), at least 1.
int physicalCores();

// True where the processor multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX).
bool hasBfloat16Products();

// True where it does so in tiles (AMX), which only the matrix library uses.
bool hasMatrixTiles();

}  // namespace lora_da
