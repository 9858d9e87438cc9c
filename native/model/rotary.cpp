#include "model/rotary.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/error.h"

namespace lora_da {

Rotary RotaryTable::get(Device& device, const DecoderSpec& spec, int64_t positions) {
  if (spec.positionLimit > 0 && positions > spec.positionLimit) {
    throw Error(code::invalidArgument, "a sequence may take " + std::to_string(positions) +
                                           " positions, but the model's rotary embedding is supported up to " +
                                           std::to_string(spec.positionLimit));
  }
  const auto pairs = static_cast<int64_t>(spec.inverseFrequencies.size());
  if (positions > positions_) {
    const int64_t count = std::max<int64_t>({positions, 2 * positions_, 256});
    std::vector<float> cosines(static_cast<size_t>(count * pairs)), sines(cosines.size());
    for (int64_t position = 0; position < count; ++position) {
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const float angle = static_cast<float>(position) * spec.inverseFrequencies[static_cast<size_t>(pair)];
        const auto i = static_cast<size_t>(position * pairs + pair);
        cosines[i] = static_cast<float>(std::cos(static_cast<double>(angle))) * spec.rotaryScale;
        sines[i] = static_cast<float>(std::sin(static_cast<double>(angle))) * spec.rotaryScale;
      }
    }
    const size_t bytes = cosines.size() * sizeof(float);
    cos_ = device.allocate(bytes, "rotary table");
    sin_ = device.allocate(bytes, "rotary table");
    device.upload(cos_.get(), cosines.data(), bytes);
    device.upload(sin_.get(), sines.data(), bytes);
    positions_ = count;
  }
  return {static_cast<const float*>(cos_.get()), static_cast<const float*>(sin_.get()), pairs};
}

}  // namespace lora_da
