#include "fisher/collection_plan.h"

#include <algorithm>
#include <string>

#include "core/error.h"
#include "core/memory_text.h"

namespace lora_da {

namespace {

// Of the memory that is free. The rest is for what is not planned: the matrix libraries' buffers, other programs.
constexpr double kShareOfFreeMemory = 0.8;

size_t bytesOf(int64_t count, size_t elementBytes) {
  return static_cast<size_t>(count) * elementBytes;
}

size_t statisticsBytes(const Projection& group, const InitializerNeeds& needs) {
  return (needs.gradient ? bytesOf(group.out * group.in, sizeof(float)) : 0) +
         (needs.inputMoment ? bytesOf(group.in * group.in, sizeof(double)) : 0) +
         (needs.outputFactor ? bytesOf(group.out, sizeof(double)) : 0);
}

// Beside the statistics, whose place the factor and the inverse of an input moment take.
size_t solveBytes(Decoder& model, const CollectionWork& work) {
  const auto& projections = model.projections();
  Device& device = model.device();
  size_t method = 0, inverse = 0, dense = 0;
  int64_t order = 0;
  for (size_t i = 0; i < projections.size(); ++i) {
    if (!work.wanted[i]) continue;
    const Projection& group = *projections[i];
    order = std::max(order, group.in);
    for (const ProjectionPart& part : group.parts) {
      if (work.method.workspaceBytes) method = std::max(method, work.method.workspaceBytes(part.out, group.in, work.rank));
    }
    if (!work.method.needs.inputMoment) continue;
    dense = std::max(dense, device.denseWorkspaceBytes(group.in, std::min(work.rank + 1, group.in)));
    if (work.modules[i] > 1) inverse = std::max(inverse, bytesOf(group.in * group.in, sizeof(double)));
  }
  // Several groups may be at work at once.
  return (method + inverse + dense) * static_cast<size_t>(device.concurrency(order));
}

size_t deviceBytes(Decoder& model, const CollectionWork& work) {
  int64_t rows = 0, labels = 0, longest = 0, in = 0;
  for (const PackedBatch& batch : work.batches) {
    rows = std::max(rows, batch.rows);
    labels = std::max(labels, batch.paddedLabelRows);
    longest = std::max(longest, batch.maxLength);
  }
  for (size_t i = 0; i < work.wanted.size(); ++i) {
    if (work.wanted[i]) in = std::max(in, model.projections()[i]->in);
  }
  // Whether the two share their memory is the device's own affair.
  return model.device().momentWorkspaceBytes(rows, in) + model.device().workspaceBytes(model.stepShape(rows, labels, longest));
}

size_t activationBytes(Decoder& model, const CollectionWork& work, bool layerByLayer) {
  size_t largest = 0;
  for (const PackedBatch& batch : work.batches) largest = std::max(largest, model.collectionBytes(batch, layerByLayer));
  return largest;
}

// Streams held at once, the gradient among them, where `layers` layers have a backward and every n-th keeps its input.
int64_t streamsHeld(int64_t layers, int64_t n) {
  const int64_t checkpoints = (layers + n - 1) / n, last = layers - (checkpoints - 1) * n;
  const int64_t atLast = checkpoints + last - 1, before = checkpoints > 1 ? checkpoints - 1 + n - 1 : 0;
  return std::max(atLast, before) + 1;
}

CollectionPlan planned(Decoder& model, const CollectionWork& work, CollectionOrder order) {
  CollectionPlan plan;
  plan.order = order;
  plan.activations = activationBytes(model, work, order == CollectionOrder::layerMajor);
  plan.workspace = solveBytes(model, work) + deviceBytes(model, work);
  plan.resident = model.residentBytes();  // after the device has been asked, which may start a library to know
  return plan;
}

[[noreturn]] void throwTooLarge(const CollectionPlan& plan, const CollectionWork& work, const CollectionRequest& request,
                                size_t free) {
  const bool sampleMajor = plan.order == CollectionOrder::sampleMajor;
  const std::string what = sampleMajor ? "with the statistics of all modules at once" : "layer by layer";
  const std::string remedy = sampleMajor ? "the plan layer-major, fewer samples" : "fewer samples";
  throw Error(code::outOfMemory, "the initialization over " + std::to_string(work.samples()) + " samples (" +
                                     std::to_string(work.rows()) + " tokens) " + what + " needs " + gigabytes(plan.total()) +
                                     " (model " + gigabytes(plan.resident) + ", statistics " + gigabytes(plan.statistics) +
                                     ", residual streams " + gigabytes(plan.streams) + ", activations " +
                                     gigabytes(plan.activations) + ", workspace " + gigabytes(plan.workspace) +
                                     "), but the memory budget is " + gigabytes(plan.budget) +
                                     (request.memoryBudget ? "" : ", for " + gigabytes(free) + " are free") + "; " + remedy +
                                     " (--samples) or a shorter --max-length take less");
}

}  // namespace

int64_t CollectionWork::rows() const {
  int64_t sum = 0;
  for (const PackedBatch& batch : batches) sum += batch.rows;
  return sum;
}

int64_t CollectionWork::samples() const {
  int64_t sum = 0;
  for (const PackedBatch& batch : batches) sum += batch.sequenceCount();
  return sum;
}

int64_t CollectionWork::lowestLayer() const {
  const auto first = std::find(wanted.begin(), wanted.end(), true);
  return first == wanted.end() ? 0 : static_cast<int64_t>(first - wanted.begin()) / static_cast<int64_t>(groupsPerLayer);
}

CollectionPlan sampleMajorPlan(Decoder& model, const CollectionWork& work) {
  CollectionPlan plan = planned(model, work, CollectionOrder::sampleMajor);
  for (size_t i = 0; i < work.wanted.size(); ++i) {
    if (work.wanted[i]) plan.statistics += statisticsBytes(*model.projections()[i], work.method.needs);
  }
  return plan;
}

CollectionPlan layerMajorPlan(Decoder& model, const CollectionWork& work, int64_t layersPerCheckpoint) {
  CollectionPlan plan = planned(model, work, CollectionOrder::layerMajor);
  plan.layersPerCheckpoint = layersPerCheckpoint;
  for (size_t first = 0; first < work.wanted.size(); first += groupsPerLayer) {
    size_t layer = 0;
    for (size_t i = first; i < first + groupsPerLayer; ++i) {
      if (work.wanted[i]) layer += statisticsBytes(*model.projections()[i], work.method.needs);
    }
    plan.statistics = std::max(plan.statistics, layer);
  }
  const int64_t held = streamsHeld(model.spec().layers - work.lowestLayer(), layersPerCheckpoint);
  plan.streams = bytesOf(held * work.rows() * model.spec().hiddenSize, sizeof(float));
  return plan;
}

CollectionPlan chooseCollectionPlan(Decoder& model, const CollectionWork& work, const CollectionRequest& request) {
  const size_t free = model.device().memory().free;
  size_t budget = request.memoryBudget;
  if (budget == 0 && free > 0)
    budget = model.residentBytes() + static_cast<size_t>(kShareOfFreeMemory * static_cast<double>(free));
  std::optional<CollectionPlan> smallest;
  const auto fits = [&](CollectionPlan& plan) {
    plan.budget = budget;
    if (!smallest || plan.total() < smallest->total()) smallest = plan;
    return budget == 0 || plan.total() <= budget;
  };

  if (request.order != CollectionOrder::layerMajor) {
    CollectionPlan plan = sampleMajorPlan(model, work);
    if (fits(plan)) return plan;
  }
  if (request.order != CollectionOrder::sampleMajor) {
    const int64_t layers = model.spec().layers - work.lowestLayer();
    for (int64_t n = 1; n <= layers; ++n) {
      CollectionPlan plan = layerMajorPlan(model, work, n);
      if (fits(plan)) return plan;
    }
  }
  throwTooLarge(*smallest, work, request, free);
}

}  // namespace lora_da
