// A frozen weight of the CPU device, in the layouts that its uses need.
#pragma once

#include "core/device.h"

namespace lora_da::cpu {

class CpuWeight : public Weight {
 public:
  DType dtype = DType::f32;     // of every layout
  const void* plain = nullptr;  // [out, in] row-major; null once packed copies replace it
  Buffer plainOwner;            // set where `plain` is a converted or stacked copy and not mapped pages
  Buffer packedForward;         // layout chosen by oneDNN for y = x W^T; null: products read `plain`
  Buffer packedInputGrad;       // and for dx = dy W
};

}  // namespace lora_da::cpu
