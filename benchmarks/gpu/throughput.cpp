// Training steps and LoRA-DA starts of well-known decoder shapes with random weights: tokens/s, share of the peak, memory.
//
//   bench_gpu_throughput [--device cuda] [--dtype bfloat16] [--models smollm2-135m,llama-3.2-1b,llama-2-7b]
//                        [--shapes 4x256,8x512] [--rank 8] [--steps 10] [--warmup 3] [--recorded yes,no]
//                        [--start 256x128] [--size full|tiny] [--results FILE]
//
// A step: sequences x tokens, every token labelled; forward, backward, clipping and AdamW on adapters of all linear modules,
// cut into passes as the trainer cuts it; the median over `steps`, each to the loss on the host. `--recorded no` enqueues each
// operation anew instead of replaying a recording. The share is of the peak, by the flops that a step needs (models.h).
// A start: the default LoRA-DA over samples x tokens, in the order of collection that fits. `--start none` leaves it out.
// Memory is what the device holds: after the steps, and the most seen while the start made progress.
#include <algorithm>
#include <stdexcept>

#include "card.h"
#include "core/error.h"
#include "init/adapter_initialization.h"
#include "models.h"

using namespace lora_da;
using namespace lora_da::bench;

namespace {

std::unique_ptr<Device> open(const Options& options, bool recorded) {
  DeviceOptions device;
  device.device = options.text("--device");
  device.computeType = options.type();
  device.record = recorded;
  return makeDevice(device);
}

double gigabytes(size_t bytes) {
  return static_cast<double>(bytes) / 1e9;
}

class Throughput {
 public:
  Throughput(const Options& options, Results& results) : options_(options), results_(results) {}

  void run() {
    measurePeak();
    for (const std::string& model : options_.list("--models")) {
      for (const std::string& recorded : options_.list("--recorded")) {
        guarded(model, [&] { runModel(model, recorded == "yes"); });
      }
    }
  }

 private:
  void measurePeak() {
    const auto device = open(options_, true);
    CardSizes sizes;
    if (options_.text("--size") == "tiny") sizes = {1 << 16, 64, 32};
    const Card card = measureCard(*device, sizes, {3, 0.02});
    peak_ = card.peak;
    std::printf("%s, %s; shares are of %.4g TFLOP/s: %s\n", device->name().c_str(), nameOf(device->computeType()), peak_ / 1e12,
                card.peakSource.c_str());
  }

  // A model that does not fit is no failure of the card's.
  void guarded(const std::string& what, const std::function<void()>& body) {
    try {
      body();
    } catch (const Error& error) {
      if (error.code() != code::outOfMemory) throw;
      results_.skip(what, error.what());
    }
  }

  void runModel(const std::string& name, bool recorded) {
    const DecoderSpec spec = specOf(name);
    const RandomWeights weights(spec);
    const double start = now();
    Decoder model(spec, weights.tensors(), open(options_, recorded), [](int64_t, int64_t) {});
    model.device().synchronize();
    if (recorded) results_.add(name + ": load " + std::to_string(model.parameters() / 1000000) + "M weights", now() - start, "s");
    addRandomAdapters(model, options_.number("--rank"));
    for (const std::string& shape : options_.list("--shapes")) {
      const std::string what = name + ", step of " + shape + (recorded ? "" : ", not replayed");
      guarded(what, [&] { steps(what, model, pairOf(shape)); });
    }
    if (recorded && options_.text("--start") != "none") {
      const std::string what = name + ", start from " + options_.text("--start");
      guarded(what, [&] { startFromData(what, model, pairOf(options_.text("--start"))); });
    }
  }

  void steps(const std::string& what, Decoder& model, std::pair<int64_t, int64_t> shape) {
    const auto [sequences, length] = shape;
    const std::vector<TokenBatch> batches =
        splitIntoPasses(randomBatch(model.spec(), sequences, length), model.device().passTokens());
    StepOptions step;
    step.optimizer.learningRate = 1e-4f;
    step.optimizer.maxGradNorm = 1;
    std::vector<double> seconds;
    const int64_t warmup = options_.number("--warmup"), count = warmup + options_.number("--steps");
    for (step.optimizer.step = 1; step.optimizer.step <= count; ++step.optimizer.step) {
      const double start = now();
      model.trainStep(batches, step);
      if (step.optimizer.step > warmup) seconds.push_back(now() - start);
    }
    const double typical = median(seconds);
    char detail[64];
    std::snprintf(detail, sizeof detail, "%.2f ms, fastest %.2f, slowest %.2f", typical * 1e3,
                  *std::min_element(seconds.begin(), seconds.end()) * 1e3,
                  *std::max_element(seconds.begin(), seconds.end()) * 1e3);
    results_.add(what, static_cast<double>(sequences * length) / typical, "tokens/s",
                 stepFlops(model.spec(), options_.number("--rank"), sequences, length) / typical / peak_, detail);
    results_.add(what + ": memory held", gigabytes(model.device().memory().held), "GB");
  }

  void startFromData(const std::string& what, Decoder& model, std::pair<int64_t, int64_t> shape) {
    const auto [samples, length] = shape;
    const std::vector<TokenBatch> batches =
        splitIntoPasses(randomBatch(model.spec(), samples, length), model.device().passTokens());
    AdapterInitialization initialization;
    initialization.method = "lora-da";
    initialization.options.population = static_cast<double>(samples);
    size_t most = 0;
    const double start = now();
    const AdapterInitializationResult result =
        initializeAdapters(model, batches, initialization,
                           [&](InitializationPhase, int64_t, int64_t) { most = std::max(most, model.device().memory().held); });
    results_.add(what, now() - start, "s", -1, std::string("collected ") + nameOf(result.plan->order));
    results_.add(what + ": collect", result.collectSeconds, "s");
    results_.add(what + ": solve", result.solveSeconds, "s");
    results_.add(what + ": most memory held", gigabytes(most), "GB", -1, "of a plan of " + planned(*result.plan));
  }

  static std::string planned(const CollectionPlan& plan) {
    char text[32];
    std::snprintf(text, sizeof text, "%.2f GB", gigabytes(plan.total()));
    return text;
  }

  const Options& options_;
  Results& results_;
  double peak_ = 0;
};

}  // namespace

int main(int count, char** arguments) {
  try {
    const Options options(count, arguments,
                          {{"--device", "cuda"},
                           {"--dtype", "bfloat16"},
                           {"--models", "smollm2-135m,llama-3.2-1b,llama-2-7b"},
                           {"--shapes", "4x256,8x512"},
                           {"--rank", "8"},
                           {"--steps", "10"},
                           {"--warmup", "3"},
                           {"--recorded", "yes,no"},
                           {"--start", "256x128"},
                           {"--size", "full"},
                           {"--results", ""}});
    Results results(options.text("--results"));
    Throughput(options, results).run();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_gpu_throughput: %s\n", error.what());
    return 1;
  }
}
