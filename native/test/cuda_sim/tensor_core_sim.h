// The host's cuda/tensor_core.h: warp-level products and tile loads as single operations of all 32 lanes, asynchronous copies
// that land as late as they may.
#pragma once

#include <cmath>
#include <limits>

#include "simt.h"

namespace cuda_sim {

void warpProduct(float* d, const uint32_t* a, const uint32_t* b, const char* file, int line);
void warpLoadTiles(uint32_t* r, const void* row, bool transposed, const char* file, int line);
void startCopy(void* shared, const void* global, bool inside, const char* file, int line);
void closeCopyGroup();
void landCopies(int pending);

}  // namespace cuda_sim

namespace lora_da::cuda {

inline void mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_SIM_PLACE) {
  cuda_sim::warpProduct(d, a, b, file, line);
}
inline void loadTiles(uint32_t (&r)[4], const void* row, CUDA_SIM_PLACE) {
  cuda_sim::warpLoadTiles(r, row, false, file, line);
}
inline void loadTilesTransposed(uint32_t (&r)[4], const void* row, CUDA_SIM_PLACE) {
  cuda_sim::warpLoadTiles(r, row, true, file, line);
}
inline void copyAsync16(void* shared, const void* global, bool inside, CUDA_SIM_PLACE) {
  cuda_sim::startCopy(shared, global, inside, file, line);
}
inline void commitCopies() {
  cuda_sim::closeCopyGroup();
}
template <int pending>
void waitCopies() {
  cuda_sim::landCopies(pending);
}

inline float exp2Flushed(float x) {
  const float power = std::exp2(x);
  return power < std::numeric_limits<float>::min() ? 0.0f : power;
}

}  // namespace lora_da::cuda
