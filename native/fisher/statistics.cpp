#include "fisher/statistics.h"

#include <algorithm>
#include <string>

#include "model/arena.h"
#include "model/step_buffers.h"

namespace lora_da {

namespace {

double meanFactor(int64_t count) {
  return count > 0 ? 1.0 / static_cast<double>(count) : 0.0;
}

// From so many tokens for each channel on, Z has full rank and rows may be added in groups.
constexpr int64_t tokensPerChannel = 3;

int64_t maskedTokensOf(const PackedBatch& batch, TokenMask mask) {
  return mask == TokenMask::attention ? batch.tokens : batch.labelRows;
}

}  // namespace

int64_t maskedTokens(const std::vector<PackedBatch>& batches, TokenMask mask) {
  int64_t sum = 0;
  for (const PackedBatch& batch : batches) sum += maskedTokensOf(batch, mask);
  return sum;
}

Statistics::Statistics(Device& device, const std::vector<const Projection*>& projections, const std::vector<bool>& wanted,
                       InitializerNeeds needs, TokenMask mask, int64_t tokens)
    : device_(device), projections_(projections), mask_(mask), tokens_(tokens), sums_(projections.size()) {
  for (size_t first = 0; first < projections.size(); first += groupsPerLayer) allocateLayer(first, wanted, needs);
}

// One block for a layer: it is cleared at once, and large enough for the pages that a device has for large ones.
void Statistics::allocateLayer(size_t first, const std::vector<bool>& wanted, InitializerNeeds needs) {
  const auto arena = std::make_shared<Arena>();  // lives as long as one of its parts
  const auto layout = [&] {
    const auto part = [&](bool needed, int64_t count, size_t elementBytes) {
      if (!needed) return Buffer();
      return Buffer(arena->take(static_cast<size_t>(count) * elementBytes), [arena](void*) {});
    };
    for (size_t i = first; i < std::min(first + groupsPerLayer, projections_.size()); ++i) {
      if (!wanted[i]) continue;
      const Projection& group = *projections_[i];
      sums_[i].gradient = part(needs.gradient, group.out * group.in, sizeof(float));
      sums_[i].inputMoment = part(needs.inputMoment, group.in * group.in, sizeof(double));
      sums_[i].outputFactor = part(needs.outputFactor, group.out, sizeof(double));
    }
  };
  layout();
  const size_t bytes = arena->used();
  if (bytes == 0) return;
  arena->reserve(device_, bytes, "statistics of the layer of " + projections_[first]->parts.front().module);
  arena->rewind();
  device_.zero(arena->take(bytes), bytes);
  arena->rewind();
  layout();
}

void Statistics::beginBatch(const PackedBatch& batch) {
  samples_ += batch.sequenceCount();
  batchTokens_ = batch.tokens;
  batchLabelRows_ = batch.labelRows;
  maskedTokens_ += maskedTokensOf(batch, mask_);
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
    const MomentSum sum = tokens_ >= tokensPerChannel * x.cols ? MomentSum::grouped : MomentSum::exact;
    if (rows.rows > 0) device_.secondMoment(rows, sum, {sums.inputMoment.get(), DType::f64, x.cols, x.cols, x.cols});
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
