// What a step may cost besides time, once the first steps of its shape are over: no device memory, no page fault, and no more
// host memory than the step before (the argument lists that oneDNN makes anew for each product, the vectors that a batch is
// packed in). Counts only: no test depends on a time.
#include <doctest/doctest.h>
#include <malloc.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "core/profiled_device.h"
#include "model/decoder.h"
#include "random_checkpoint.h"
#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

std::atomic<int64_t> newCalls{0};

}  // namespace

#ifndef __SANITIZE_ADDRESS__
// Replacements of the global operators count what the process takes with new. Not inlined: GCC would see free() meet new.
__attribute__((noinline)) void* operator new(std::size_t bytes) {
  newCalls.fetch_add(1, std::memory_order_relaxed);
  if (void* memory = std::malloc(bytes ? bytes : 1)) return memory;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* memory) noexcept {
  std::free(memory);
}
__attribute__((noinline)) void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
#endif

namespace {

constexpr int warmupSteps = 3, countedSteps = 5;

StepOptions smallStep(Recompute recompute = Recompute::none) {
  StepOptions options;
  options.optimizer.learningRate = 1e-3f;
  options.recompute = recompute;
  return options;
}

struct Trained {
  Trained(const TestDevice& tested, DType type, bool profile = false)
      : checkpoint(1), model(checkpoint.load(tested, type, profile)) {
    model->addLora(checkpoint.modules, 2, 1.0f);
    model->lora()->write(model->device(), LoraSet::Array::value, checkpoint.randomFactors(*model));
  }
  RandomCheckpoint checkpoint;
  std::unique_ptr<Decoder> model;
};

// A small step, and one whose host arrays are beyond malloc's first threshold for pages of its own (128 KiB).
const std::vector<std::vector<int32_t>> stepLengths = {{20, 44}, std::vector<int32_t>(680, 50)};

int64_t pageFaults() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);  // of all threads: OpenMP's too
  return usage.ru_minflt + usage.ru_majflt;
}

}  // namespace

DEVICE_TEST_CASE("a steady step allocates no device memory") {
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const Recompute recompute : {Recompute::none, Recompute::layer}) {
      CAPTURE(nameOf(type));
      Trained trained(tested, type, true);
      // Micro-batches of two shapes in turn: neither may throw away what the other needs.
      const std::vector<TokenBatch> batches = {trained.checkpoint.batch({20, 44}), trained.checkpoint.batch({150, 31, 7})};
      const auto step = [&] { trained.model->trainStep(batches, smallStep(recompute)); };
      for (int i = 0; i < warmupSteps; ++i) step();
      auto& device = dynamic_cast<ProfiledDevice&>(trained.model->device());
      device.reset();
      for (int i = 0; i < countedSteps; ++i) step();
      int64_t calls = 0;
      for (const OperationProfile& operation : device.profile()) {
        calls += operation.calls;
        CHECK(operation.operation != "allocate");
        CHECK(operation.calls % countedSteps == 0);  // each step makes the same calls
      }
      CHECK(calls > 0);
    }
  }
}

TEST_CASE("steady steps take the same host memory, and give it back" *
          cpuOnly("drivers, simulators and guards take memory of the process for themselves", ownHeap)) {
  for (const std::vector<int32_t>& lengths : stepLengths) {
    Trained trained({"cpu"}, DType::f32);
    const std::vector<TokenBatch> batches = {trained.checkpoint.batch(lengths)};
    for (int i = 0; i < warmupSteps; ++i) trained.model->trainStep(batches, smallStep());
    std::vector<int64_t> calls(countedSteps);
    std::vector<size_t> inUse(countedSteps);
    const auto same = [](const auto& values) { return std::count(values.begin(), values.end(), values[0]) == countedSteps; };
    // What other threads give back to malloc may count a step later; steps that take ever more would differ in every try.
    for (int attempt = 0; attempt < 4 && !(attempt > 0 && same(calls) && same(inUse)); ++attempt) {
      for (int i = 0; i < countedSteps; ++i) {
        const auto step = static_cast<size_t>(i);
        const int64_t before = newCalls.load();
        trained.model->trainStep(batches, smallStep());
        calls[step] = newCalls.load() - before;
        const auto info = mallinfo2();
        inUse[step] = info.uordblks + info.hblkhd;
      }
    }
    MESSAGE("calls of operator new in a step of ", batches[0].inputIds.size(), " tokens: ", calls[0]);
    CHECK(same(calls));
    CHECK(same(inUse));
  }
}

TEST_CASE("a steady step has no page faults" *
          cpuOnly("drivers, simulators and guards touch memory of the process for themselves", ownHeap)) {
  for (const std::vector<int32_t>& lengths : stepLengths) {
    Trained trained({"cpu"}, DType::bf16);
    const std::vector<TokenBatch> batches = {trained.checkpoint.batch(lengths)};
    for (int i = 0; i < warmupSteps; ++i) trained.model->trainStep(batches, smallStep());
    // The kernel may move a page at any moment; a step that faults would fault in every try.
    int64_t fewest = -1;
    for (int attempt = 0; attempt < 4 && fewest != 0; ++attempt) {
      const int64_t before = pageFaults();
      for (int i = 0; i < countedSteps; ++i) trained.model->trainStep(batches, smallStep());
      const int64_t faults = pageFaults() - before;
      fewest = fewest < 0 ? faults : std::min(fewest, faults);
    }
    CAPTURE(lengths.front());
    CHECK(fewest == 0);
  }
}

TEST_CASE("a step's arena is as large as recorded" * cpuOnly("a device may want room behind the inputs of products")) {
  // Hidden and query width 24, qkv 48, MLP 40, 4 heads, 2 key heads, 2 layers, rank 2 on every module: down-projections of
  // 6, 2, 4 and 2. T tokens and L labels are rounded up to 64. Bytes of a token with activations of e bytes:
  //   streams  192: the float32 stream entering a layer and in its middle. In float32 each layer keeps them; in bfloat16 all
  //            layers use the same, and each keeps what entered its norms (48 e)
  //   layer    48 + 214 e: rstds and lse; qkv before and after the rotation, context, gate|up, down-projections (48 + 48 + 24 +
  //            80 + 14)
  //   scratch  292 + 182 e: final stream with its rstd, gradients of stream and norm (3 * 96 + 4); normed, hidden, and the
  //            gradients of hidden, context, qkv and down (24 + 40 + 40 + 24 + 48 + 6); in bfloat16 also what entered the final
  //            norm and the rounded gradient of the stream (48 e)
  // and of a label 100 + 24 e. With recomputation one layer is kept, and the stream entering each.
  struct Recorded {
    DType type;
    Recompute recompute;
    int64_t tokens, labels;
    size_t bytes;
  };
  const std::vector<Recorded> shapes = {
      {DType::f32, Recompute::none, 128, 64, 423680},     // 128 · 3212 + 64 · 196
      {DType::f32, Recompute::none, 600, 300, 2118400},   // 640 · 3212 + 320 · 196
      {DType::bf16, Recompute::none, 600, 300, 1383680},  // 640 · 2088 + 320 · 148
      {DType::f32, Recompute::layer, 600, 300, 1478400},  // 640 · 2212 + 320 · 196
  };
  for (const Recorded& shape : shapes) {
    Trained trained({"cpu"}, shape.type);
    CAPTURE(nameOf(shape.type));
    CAPTURE(shape.tokens);
    CHECK(trained.model->planMemory(shape.tokens, shape.labels, shape.tokens, shape.recompute).activations == shape.bytes);
  }
}
