// Tables of the rotary position embedding, grown to the longest sequence seen.
#pragma once

#include "core/device.h"
#include "model/decoder_spec.h"

namespace lora_da {

class RotaryTable {
 public:
  // Tables of at least `positions` rows. Throws Error(invalidArgument) beyond the spec's positionLimit. As in transformers,
  // angles are float32 products of position and inverse frequency.
  Rotary get(Device& device, const DecoderSpec& spec, int64_t positions);

 private:
  Buffer cos_, sin_;
  int64_t positions_ = 0;
};

}  // namespace lora_da
