// The memory that an initialization takes, before any of it is allocated, and the choice between two orders of collection:
// sample-major, one pass over each batch with the statistics of all modules at once; and layer-major, all batches through one
// layer at a time, whose modules are solved before the next layer's statistics begin. Both add the same numbers in the same
// order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "init/initializer.h"
#include "model/decoder.h"

namespace lora_da {

enum class CollectionOrder { sampleMajor, layerMajor };

constexpr const char* nameOf(CollectionOrder order) {
  return order == CollectionOrder::sampleMajor ? "sample-major" : "layer-major";
}

// What an initialization will do.
struct CollectionWork {
  std::vector<PackedBatch> batches;
  std::vector<bool> wanted;     // an entry per projection group: has modules to solve
  std::vector<size_t> modules;  // an entry per projection group: how many
  Initializer method;
  int64_t rank = 0;

  int64_t rows() const;
  int64_t samples() const;
  // The first layer with a wanted group (0 where there is none): no gradient is needed below it.
  int64_t lowestLayer() const;
};

struct CollectionRequest {
  std::optional<CollectionOrder> order;  // absent: by memory
  size_t memoryBudget = 0;               // bytes that the process may hold in all; 0: what it holds and most of what is free
};

// Bytes, each part at its largest.
struct CollectionPlan {
  CollectionOrder order = CollectionOrder::sampleMajor;
  // Layer-major: the stream entering every n-th layer is kept from forward, those between are made again when backward comes to
  // them. 1: all are kept.
  int64_t layersPerCheckpoint = 1;
  size_t resident = 0;     // the process with the model: weights, adapters, the runtime
  size_t statistics = 0;   // of all modules, or of one layer's
  size_t streams = 0;      // layer-major: residual streams and their gradient, of all batches
  size_t activations = 0;  // of the largest batch: all layers', or one layer's
  size_t workspace = 0;    // of the solve and of the device
  size_t budget = 0;       // that it was chosen for

  size_t total() const { return resident + statistics + streams + activations + workspace; }
};

CollectionPlan sampleMajorPlan(Decoder& model, const CollectionWork& work);
CollectionPlan layerMajorPlan(Decoder& model, const CollectionWork& work, int64_t layersPerCheckpoint);

// The fastest plan that fits: sample-major, then layer-major with as many streams kept as fit. Throws Error(outOfMemory), saying
// what is needed and what there is.
CollectionPlan chooseCollectionPlan(Decoder& model, const CollectionWork& work, const CollectionRequest& request);

}  // namespace lora_da
