#include "fisher/layer_major.h"

#include <algorithm>
#include <string>

namespace lora_da {

namespace {

// The residual streams of all batches: one allocation a layer, so that it goes back to the system as a whole.
class Streams {
 public:
  Streams(Decoder& model, const CollectionWork& work)
      : device_(model.device()),
        hidden_(model.spec().hiddenSize),
        rows_(work.rows()),
        inputs_(static_cast<size_t>(model.spec().layers)) {
    gradient_ = allocate("gradient of the residual stream");
  }

  void keep(int64_t layer) { at(layer) = allocate("residual stream entering layer " + std::to_string(layer)); }
  void drop(int64_t layer) { at(layer).reset(); }
  void dropGradient() { gradient_.reset(); }

  // Those of the batch whose first row is the `first` of all.
  ResidualStreams of(const PackedBatch& batch, int64_t first) const {
    ResidualStreams streams;
    for (const Buffer& input : inputs_) streams.inputs.push_back(view(input, first, batch.rows));
    streams.gradient = view(gradient_, first, batch.rows);
    return streams;
  }

 private:
  Buffer& at(int64_t layer) { return inputs_[static_cast<size_t>(layer)]; }
  Buffer allocate(const std::string& purpose) {
    return device_.allocate(static_cast<size_t>(rows_ * hidden_) * sizeof(float), purpose);
  }
  Matrix view(const Buffer& buffer, int64_t first, int64_t rows) const {
    if (!buffer) return {};
    return Matrix{buffer.get(), DType::f32, rows_, hidden_, hidden_}.rowRange(first, rows);
  }

  Device& device_;
  int64_t hidden_, rows_;
  std::vector<Buffer> inputs_;
  Buffer gradient_;
};

// Layers first .. last-1, of which only the first keeps its input from the forward through the model.
struct Segment {
  int64_t first, last;
  bool atTop;  // the last layers: backward begins here, so that forward keeps all their inputs

  bool madeAgain() const { return !atTop && last - first > 1; }
};

// From the last one down.
std::vector<Segment> segmentsOf(Decoder& model, const CollectionWork& work, int64_t layersPerCheckpoint) {
  std::vector<Segment> segments;
  const int64_t layers = model.spec().layers;
  for (int64_t first = work.lowestLayer(); first < layers; first += layersPerCheckpoint) {
    const int64_t last = std::min(first + layersPerCheckpoint, layers);
    segments.insert(segments.begin(), {first, last, last == layers});
  }
  return segments;
}

}  // namespace

void collectByLayer(Decoder& model, CollectionWork& work, TokenMask mask, int64_t layersPerCheckpoint,
                    const std::function<void(int64_t layer, Statistics& statistics)>& solve, const std::function<void()>& step) {
  Streams streams(model, work);
  const auto eachBatch = [&](const auto& pass) {
    int64_t first = 0;
    for (PackedBatch& batch : work.batches) {
      pass(batch, streams.of(batch, first));
      first += batch.rows;
      step();
    }
  };

  const int64_t tokens = maskedTokens(work.batches, mask);
  const std::vector<Segment> segments = segmentsOf(model, work, layersPerCheckpoint);
  for (const Segment& segment : segments) streams.keep(segment.first);
  for (int64_t layer = segments.front().first + 1; layer < segments.front().last; ++layer) streams.keep(layer);
  eachBatch([&](PackedBatch& batch, const ResidualStreams& of) { model.collectForward(batch, of); });

  for (const Segment& segment : segments) {
    if (segment.madeAgain()) {
      for (int64_t layer = segment.first + 1; layer < segment.last; ++layer) streams.keep(layer);
      eachBatch([&](PackedBatch& batch, const ResidualStreams& of) {
        model.forwardLayers(batch, segment.first, segment.last - 1, of);
      });
    }
    for (int64_t layer = segment.last - 1; layer >= segment.first; --layer) {
      std::vector<bool> wanted(work.wanted.size(), false);
      const auto group = static_cast<int64_t>(groupsPerLayer) * layer;
      std::copy_n(work.wanted.begin() + group, groupsPerLayer, wanted.begin() + group);
      Statistics statistics(model.device(), model.projections(), wanted, work.method.needs, mask, tokens);
      eachBatch([&](PackedBatch& batch, const ResidualStreams& of) {
        statistics.beginBatch(batch);
        model.collectLayer(batch, layer, of, statistics);
      });
      streams.drop(layer);
      if (layer == work.lowestLayer()) streams.dropGradient();
      solve(layer, statistics);
    }
  }
}

int64_t layerMajorSteps(Decoder& model, const CollectionWork& work, int64_t layersPerCheckpoint) {
  int64_t passes = 1;
  for (const Segment& segment : segmentsOf(model, work, layersPerCheckpoint)) {
    passes += segment.last - segment.first + (segment.madeAgain() ? 1 : 0);
  }
  return passes * static_cast<int64_t>(work.batches.size());
}

}  // namespace lora_da
