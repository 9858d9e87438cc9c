// Collection in layer-major order: see collection_plan.h.
#pragma once

#include <functional>

#include "fisher/collection_plan.h"
#include "fisher/statistics.h"

namespace lora_da {

// All batches forward, then backward through one layer after another, from the last down to the lowest with a wanted group.
// `solve` is called after each layer with the statistics of its wanted groups; they are gone when it returns. `step` is called
// after each pass of a batch, layerMajorSteps() times in all; both may throw to stop. Batches are the model's to use meanwhile.
void collectByLayer(Decoder& model, CollectionWork& work, TokenMask mask, int64_t layersPerCheckpoint,
                    const std::function<void(int64_t layer, Statistics& statistics)>& solve, const std::function<void()>& step);

// Passes of a batch through the model's or one layer's forward, or one layer's backward.
int64_t layerMajorSteps(Decoder& model, const CollectionWork& work, int64_t layersPerCheckpoint);

}  // namespace lora_da
