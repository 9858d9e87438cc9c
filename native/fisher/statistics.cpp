#include "fisher/statistics.h"

#include <algorithm>
#include <string>

#include "model/step_buffers.h"

namespace lora_da {

namespace {

// Where the sums of one layer lie in its block.
class Places {
 public:
  size_t take(int64_t count, size_t elementBytes) {
    constexpr size_t alignment = 256;
    const size_t place = used_;
    used_ += (static_cast<size_t>(count) * elementBytes + alignment - 1) / alignment * alignment;
    return place;
  }
  size_t used() const { return used_; }

 private:
  size_t used_ = 0;
};

// A part of a block, which lives as long as one of its parts.
Buffer partOf(const std::shared_ptr<Buffer>& block, size_t place) {
  return Buffer(static_cast<char*>(block->get()) + place, [block](void*) {});
}

double meanFactor(int64_t count) {
  return count > 0 ? 1.0 / static_cast<double>(count) : 0.0;
}

}  // namespace

Statistics::Statistics(Device& device, const std::vector<const Projection*>& projections, const std::vector<bool>& wanted,
                       InitializerNeeds needs, TokenMask mask)
    : device_(device), projections_(projections), mask_(mask), sums_(projections.size()) {
  for (size_t first = 0; first < projections.size(); first += groupsPerLayer) allocateLayer(first, wanted, needs);
}

// One block for a layer: it is cleared at once, and large enough for the pages that a device has for large ones.
void Statistics::allocateLayer(size_t first, const std::vector<bool>& wanted, InitializerNeeds needs) {
  struct Place {
    size_t group, gradient, inputMoment, outputFactor;
  };
  Places places;
  std::vector<Place> layer;
  for (size_t i = first; i < std::min(first + groupsPerLayer, projections_.size()); ++i) {
    if (!wanted[i]) continue;
    const Projection& group = *projections_[i];
    Place place{i, 0, 0, 0};
    if (needs.gradient) place.gradient = places.take(group.out * group.in, sizeof(float));
    if (needs.inputMoment) place.inputMoment = places.take(group.in * group.in, sizeof(double));
    if (needs.outputFactor) place.outputFactor = places.take(group.out, sizeof(double));
    layer.push_back(place);
  }
  if (places.used() == 0) return;
  const std::string purpose = "statistics of the layer of " + projections_[first]->parts.front().module;
  const auto block = std::make_shared<Buffer>(device_.allocate(places.used(), purpose));
  device_.zero(block->get(), places.used());
  for (const Place& place : layer) {
    Sums& sums = sums_[place.group];
    if (needs.gradient) sums.gradient = partOf(block, place.gradient);
    if (needs.inputMoment) sums.inputMoment = partOf(block, place.inputMoment);
    if (needs.outputFactor) sums.outputFactor = partOf(block, place.outputFactor);
  }
}

void Statistics::beginBatch(const PackedBatch& batch) {
  samples_ += batch.sequenceCount();
  batchTokens_ = batch.tokens;
  batchLabelRows_ = batch.labelRows;
  maskedTokens_ += mask_ == TokenMask::attention ? batch.tokens : batch.labelRows;
  if (mask_ == TokenMask::labels && batch.labelRows > 0) {
    const size_t bytes = static_cast<size_t>(batch.labelRows) * sizeof(int32_t);
    labelIndex_ = device_.allocate(bytes, "label rows");
    device_.upload(labelIndex_.get(), batch.labelIndex.data(), bytes);
  }
}

Matrix Statistics::masked(const Matrix& x, Buffer& copy, size_t& copyBytes) {
  if (mask_ == TokenMask::attention) return x.rowRange(0, batchTokens_);
  const size_t bytes = static_cast<size_t>(batchLabelRows_ * x.cols) * sizeOf(x.dtype);
  if (bytes > copyBytes) {
    copy = device_.allocate(bytes, "masked rows");
    copyBytes = bytes;
  }
  const Matrix rows{copy.get(), x.dtype, batchLabelRows_, x.cols, x.cols};
  if (batchLabelRows_ > 0) device_.gatherRows(x, static_cast<const int32_t*>(labelIndex_.get()), rows);
  return rows;
}

void Statistics::observe(size_t group, const Matrix& x, const Matrix& dy) {
  const Sums& sums = sums_[group];
  if (sums.gradient) {
    const Matrix gradient{sums.gradient.get(), DType::f32, dy.cols, x.cols, x.cols};
    device_.matmul(Transpose::yes, dy, Transpose::no, x, 1.0f, true, gradient);
  }
  if (sums.inputMoment) {
    const Matrix rows = masked(x, inputCopy_, inputCopyBytes_);
    if (rows.rows > 0) device_.secondMoment(rows, {sums.inputMoment.get(), DType::f64, x.cols, x.cols, x.cols});
  }
  if (sums.outputFactor) {
    const Matrix rows = masked(dy, outputCopy_, outputCopyBytes_);
    if (rows.rows > 0) device_.squareSum(rows, static_cast<double*>(sums.outputFactor.get()));
  }
}

GroupStatistics Statistics::take(size_t index) {
  const Projection& group = *projections_[index];
  Sums& sums = sums_[index];
  GroupStatistics result;
  if (sums.gradient) {
    device_.scale({sums.gradient.get(), DType::f32, group.out, group.in, group.in}, meanFactor(samples_));
    result.gradient = std::move(sums.gradient);
  }
  if (sums.inputMoment) {
    device_.scale(denseView(static_cast<double*>(sums.inputMoment.get()), group.in, group.in), meanFactor(maskedTokens_));
    result.inputMoment = std::move(sums.inputMoment);
  }
  if (sums.outputFactor) {
    const Matrix diagonal = denseView(static_cast<double*>(sums.outputFactor.get()), 1, group.out);
    device_.scale(diagonal, meanFactor(maskedTokens_));
    result.outputFactor.resize(static_cast<size_t>(group.out));
    device_.download(result.outputFactor.data(), diagonal.data, result.outputFactor.size() * sizeof(double));
    device_.synchronize();
    sums.outputFactor.reset();
  }
  return result;
}

}  // namespace lora_da
