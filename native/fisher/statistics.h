// What one pass over a few hundred samples tells about every linear module: G, Z and ydiag (DESIGN: gradient, input second
// moment, diagonal of the output factor), collected together. Modules that read the same input share one Z.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/device.h"
#include "init/initializer.h"
#include "model/batch.h"
#include "model/projection.h"

namespace lora_da {

// Which tokens Z and ydiag are averaged over; G always takes all.
enum class TokenMask { attention, labels };

// The tokens of these batches that the mask keeps.
int64_t maskedTokens(const std::vector<PackedBatch>& batches, TokenMask mask);

// One group's statistics: on the device, but for the smallest.
struct GroupStatistics {
  Buffer gradient;     // [out, in] float32, mean over samples; the rows of a module are those of its columns in the group
  Buffer inputMoment;  // [in, in] float64, mean over masked tokens; the lower triangle
  std::vector<double> outputFactor;  // [out], host memory, mean over masked tokens
};

// Z is summed in float64: the damping may be far below float32's rounding of Z, and the small eigenvalues it is added to, or the
// zero ones of a set with fewer tokens than channels, then survive. In bfloat16 each element of x has been rounded by itself,
// which alone adds about 1e-6 of a channel's mean square to every direction of Z that the tokens span; where they are many times
// the channels, so that this is all of them, groups of rows may be added in float32, whose rounding is a hundred times less.
class Statistics : public ProjectionObserver {
 public:
  // Collects for the groups marked in `wanted` (an entry per projection) what `needs` names.
  // Batches with `tokens` tokens that the mask keeps, in all, will follow.
  Statistics(Device& device, const std::vector<const Projection*>& projections, const std::vector<bool>& wanted,
             InitializerNeeds needs, TokenMask mask, int64_t tokens);

  // Call before the pass over each batch.
  void beginBatch(const PackedBatch& batch);
  void observe(size_t group, const Matrix& x, const Matrix& dy) override;

  // Means instead of sums; the group's sums are handed over, so that it can be taken once. A layer's memory is freed with the
  // last of its groups.
  GroupStatistics take(size_t group);
  int64_t samples() const { return samples_; }

 private:
  struct Sums {
    Buffer gradient, inputMoment, outputFactor;
  };
  void allocateLayer(size_t first, const std::vector<bool>& wanted, InitializerNeeds needs);
  // The rows of x that the mask keeps: x itself without its padding, or a gathered copy.
  Matrix masked(const Matrix& x, Buffer& copy, size_t& copyBytes);

  Device& device_;
  std::vector<const Projection*> projections_;
  TokenMask mask_;
  int64_t tokens_;
  std::vector<Sums> sums_;
  int64_t samples_ = 0;
  int64_t maskedTokens_ = 0;
  int64_t batchTokens_ = 0, batchLabelRows_ = 0;
  Buffer labelIndex_;
  Buffer inputCopy_, outputCopy_;
  size_t inputCopyBytes_ = 0, outputCopyBytes_ = 0;
};

}  // namespace lora_da
