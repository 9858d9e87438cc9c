// Generation with a key/value cache: the prompt in one pass, then a token at a time.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/error.h"
#include "core/random.h"
#include "model/decoder.h"
#include "model/layers.h"

namespace lora_da {

namespace {

// The first of the largest. The value comes first, of several elements side by side, which takes a tenth of the time of a search
// for its place that carries the place along.
int32_t argmax(const std::vector<float>& logits) {
  constexpr size_t lanes = 16;
  float largest[lanes];
  std::fill_n(largest, lanes, -std::numeric_limits<float>::infinity());
  size_t i = 0;
  for (; i + lanes <= logits.size(); i += lanes) {
    for (size_t lane = 0; lane < lanes; ++lane) largest[lane] = std::max(largest[lane], logits[i + lane]);
  }
  for (; i < logits.size(); ++i) largest[0] = std::max(largest[0], logits[i]);
  const auto place = std::find(logits.begin(), logits.end(), *std::max_element(largest, largest + lanes));
  return place == logits.end() ? 0 : static_cast<int32_t>(place - logits.begin());  // none: they are no numbers
}

// A token from softmax(logits / temperature), cut to the smallest set of likeliest tokens whose probabilities reach topP.
int32_t sample(const std::vector<float>& logits, double temperature, double topP, Random& random) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const float left = logits[static_cast<size_t>(a)], right = logits[static_cast<size_t>(b)];
    return left != right ? left > right : a < b;
  });
  const double largest = logits[static_cast<size_t>(order[0])];
  std::vector<double> weights(order.size());
  double total = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    weights[i] = std::exp((logits[static_cast<size_t>(order[i])] - largest) / temperature);
    total += weights[i];
  }
  size_t kept = 0;
  double mass = 0;
  while (kept < order.size() && (kept == 0 || mass < topP * total)) mass += weights[kept++];
  double left = random.uniform() * mass;
  for (size_t i = 0; i + 1 < kept; ++i) {
    left -= weights[i];
    if (left < 0) return order[i];
  }
  return order[kept - 1];
}

}  // namespace

// Runs the batch's tokens after what the cache holds; `host` becomes the logits of the last one.
void Decoder::nextLogits(PackedBatch& batch, KvCache& cache, std::vector<float>& host) {
  const LoraSet* lora = lora_ ? &*lora_ : nullptr;
  StepBuffers buffers = prepareStep(batch, lora, {batch.rows, roundRows(1), Keep::nothing, false});
  Pass pass{batch, buffers, lora, Keep::nothing, rotary_.get(*device_, spec_, cache.capacity)};
  pass.cache = &cache;
  forward(pass);
  cache.length += batch.tokens;
  host.resize(static_cast<size_t>(spec_.vocabSize));
  const size_t bytes = host.size() * sizeof(float);
  if (!nextLogits_) nextLogits_ = device_->allocate(bytes, "logits of a token");
  const Matrix logits{nextLogits_.get(), DType::f32, 1, spec_.vocabSize, spec_.vocabSize};
  device_->linear(buffers.normed.rowRange(batch.tokens - 1, 1), weights_.head(), nullptr, nullptr, nullptr, nullptr, logits);
  device_->download(host.data(), logits.data, bytes);
  device_->synchronize();
}

std::vector<int32_t> Decoder::generate(const GenerateOptions& options, const std::function<void(int32_t)>& onToken) {
  std::vector<int32_t> generated;
  if (options.maxNewTokens <= 0) return generated;
  const auto promptLength = static_cast<int32_t>(options.inputIds.size());
  PackedBatch prompt =
      packBatch({options.inputIds, std::vector<int32_t>(options.inputIds.size(), -100), {0, promptLength}}, spec_.vocabSize);
  KvCache cache(*device_, spec_.layers, promptLength + options.maxNewTokens, spec_.kvWidth());
  Random random(options.seed, "sampling");
  std::vector<float> logits;
  nextLogits(prompt, cache, logits);
  while (true) {
    files_.checkIntact();
    const int32_t id = options.temperature > 0 ? sample(logits, options.temperature, options.topP, random) : argmax(logits);
    if (!std::isfinite(logits[static_cast<size_t>(id)])) throw Error(code::nonFinite, "the logits are not finite");
    generated.push_back(id);
    onToken(id);
    const bool stop = std::find(options.stopIds.begin(), options.stopIds.end(), id) != options.stopIds.end();
    if (stop || static_cast<int64_t>(generated.size()) >= options.maxNewTokens) return generated;
    PackedBatch next = packBatch({{id}, {-100}, {0, 1}}, spec_.vocabSize);
    next.rows = 1;  // one row: rounding up would multiply the work of every product
    next.ids.resize(1);
    next.positions.assign(1, static_cast<int32_t>(cache.length));
    next.rowFirst.resize(1);
    next.rowEnd.resize(1);
    nextLogits(next, cache, logits);
  }
}

}  // namespace lora_da
