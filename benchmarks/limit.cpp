// The time that a training step's matrix products alone take with the same library: what a step can at best come to.
//
//   bench_limit --hidden H --intermediate I --query Q --qkv W --vocab V --layers N --tokens T --labels L
//               --dtype float32|bfloat16 [--threads 0] [--sweeps 3] [--collect]
//   bench_limit --bandwidth [--threads 0]
//
// Per layer the products y = x W^T of q|k|v (H -> W, stacked), o (Q -> H), gate|up (H -> 2I, stacked) and down (I -> H), and
// dx = dy W of each but the first layer's q|k|v, below which nothing is trained; the head over the label rows in chunks, both
// ways. LoRA's thin products are not among them. Weights are packed once in the layout that the library asks for; each layer
// has weights and activations of its own, so that they come from memory as in a real step.
// --collect adds what the LoRA-DA start needs: G [out, in] float32 += dy^T x of every product, and Z [in, in] += x^T x of every
// distinct input, half of it (symmetric), in float32.
// Prints one line of JSON. Seconds are medians over the sweeps, after one of warm-up.
#include <cblas.h>
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "cpu/onednn.h"

namespace {

using dnnl::memory;

struct Options {
  int64_t hidden = 0, intermediate = 0, query = 0, qkv = 0, vocab = 0, layers = 0, tokens = 0, labels = 0, sweeps = 3;
  int threads = 0;
  bool bf16 = false, collect = false, bandwidth = false;
};

Options parse(int count, char** arguments) {
  Options options;
  int64_t threads = 0;
  const std::map<std::string, int64_t*> numbers = {{"--hidden", &options.hidden}, {"--intermediate", &options.intermediate},
                                                   {"--query", &options.query},   {"--qkv", &options.qkv},
                                                   {"--vocab", &options.vocab},   {"--layers", &options.layers},
                                                   {"--tokens", &options.tokens}, {"--labels", &options.labels},
                                                   {"--sweeps", &options.sweeps}, {"--threads", &threads}};
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    if (name == "--collect") {
      options.collect = true;
    } else if (name == "--bandwidth") {
      options.bandwidth = true;
    } else if (i + 1 == count) {
      throw std::invalid_argument("expected a value for " + name);
    } else if (name == "--dtype") {
      options.bf16 = std::string(arguments[++i]) == "bfloat16";
    } else {
      const auto found = numbers.find(name);
      if (found == numbers.end()) throw std::invalid_argument("unknown option " + name);
      *found->second = std::atoll(arguments[++i]);
    }
  }
  options.threads = static_cast<int>(threads);
  for (const auto& [name, value] : numbers) {
    if (!options.bandwidth && value != &threads && *value <= 0) throw std::invalid_argument("expected a positive " + name);
  }
  return options;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

// --- memory --------------------------------------------------------------------------------------------------------

using Block = std::unique_ptr<void, void (*)(void*)>;

// In huge pages, as the engine's own large blocks.
Block allocate(size_t bytes) {
  constexpr size_t hugePage = size_t{2} << 20;
  const size_t rounded = (bytes + hugePage - 1) / hugePage * hugePage;
  void* data = std::aligned_alloc(hugePage, rounded);
  if (!data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(data, rounded, MADV_HUGEPAGE);
#endif
  return Block(data, std::free);
}

uint64_t hash(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Matrices of one type, filled with uniform numbers in [-bound, bound].
class Matrices {
 public:
  explicit Matrices(bool bf16) : bf16_(bf16) {}

  size_t elementBytes() const { return bf16_ ? 2 : 4; }
  memory::data_type type() const { return bf16_ ? memory::data_type::bf16 : memory::data_type::f32; }

  Block random(int64_t rows, int64_t cols, float bound) {
    Block block = allocate(static_cast<size_t>(rows * cols) * elementBytes());
    const uint64_t seed = hash(++made_);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows * cols; ++i) {
      const auto bits = static_cast<float>(hash(seed + static_cast<uint64_t>(i)) >> 40);
      const float value = (bits / 8388608.0f - 1.0f) * bound;  // 2^23
      uint32_t word;
      std::memcpy(&word, &value, sizeof word);
      if (bf16_)
        static_cast<uint16_t*>(block.get())[i] = static_cast<uint16_t>(word >> 16);
      else
        static_cast<float*>(block.get())[i] = value;
    }
    return block;
  }

 private:
  bool bf16_;
  uint64_t made_ = 0;
};

// --- products ------------------------------------------------------------------------------------------------------

// c [m, n] = a [m, k] b [k, n], b in the library's own layout; or c [m, n] float32 += a^T b with a [k, m], b [k, n] as they are.
class Product {
 public:
  Product(const dnnl::engine& engine, const dnnl::stream& stream, memory::data_type type, int64_t m, int64_t n, int64_t k)
      : Product(engine, stream, m, n, k, memory::desc({m, k}, type, memory::format_tag::ab),
                memory::desc({k, n}, type, memory::format_tag::any), memory::desc({m, n}, type, memory::format_tag::ab), false) {}

  static Product gradient(const dnnl::engine& engine, const dnnl::stream& stream, memory::data_type type, int64_t m, int64_t n,
                          int64_t k) {
    return {engine,
            stream,
            m,
            n,
            k,
            memory::desc({m, k}, type, memory::dims{1, m}),
            memory::desc({k, n}, type, memory::format_tag::ab),
            memory::desc({m, n}, memory::data_type::f32, memory::format_tag::ab),
            true};
  }

  double flops() const { return flops_; }
  memory::desc weights() const { return weights_; }
  memory::dims weightDims() const { return weightDims_; }

  void run(const void* a, const void* b, void* c) {
    arguments_.at(DNNL_ARG_SRC).set_data_handle(const_cast<void*>(a));
    arguments_.at(DNNL_ARG_WEIGHTS).set_data_handle(const_cast<void*>(b));
    arguments_.at(DNNL_ARG_DST).set_data_handle(c);
    primitive_.execute(stream_, arguments_);
    stream_.wait();
  }

 private:
  Product(const dnnl::engine& engine, const dnnl::stream& stream, int64_t m, int64_t n, int64_t k, const memory::desc& a,
          const memory::desc& b, const memory::desc& c, bool accumulate)
      : stream_(stream),
        flops_(2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k)),
        weightDims_{k, n} {
    dnnl::primitive_attr attributes;
    dnnl::post_ops ops;
    if (accumulate) ops.append_sum(1.0f);
    attributes.set_post_ops(ops);
    const auto description = lora_da::cpu::matmulDescription(engine, a, b, nullptr, c, attributes);
    weights_ = description.weights_desc();
    primitive_ = dnnl::matmul(description);
    arguments_.emplace(DNNL_ARG_SRC, memory(a, engine, nullptr));
    arguments_.emplace(DNNL_ARG_WEIGHTS, memory(weights_, engine, nullptr));
    arguments_.emplace(DNNL_ARG_DST, memory(c, engine, nullptr));
  }

  dnnl::stream stream_;
  double flops_;
  memory::desc weights_;
  memory::dims weightDims_;
  dnnl::matmul primitive_;
  std::unordered_map<int, memory> arguments_;
};

class Library {
 public:
  explicit Library(memory::data_type type) : type_(type), engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {}

  Product product(int64_t m, int64_t n, int64_t k) const { return {engine_, stream_, type_, m, n, k}; }
  Product gradient(int64_t m, int64_t n, int64_t k) const { return Product::gradient(engine_, stream_, type_, m, n, k); }

  // A copy of the row-major plain [k, n] in the layout that the product wants.
  Block pack(const Product& product, const void* plain) const {
    const memory::desc description = product.weights();
    Block block = allocate(description.get_size());
    memory from(memory::desc(product.weightDims(), type_, memory::format_tag::ab), engine_, const_cast<void*>(plain));
    memory to(description, engine_, block.get());
    dnnl::stream stream = stream_;
    dnnl::reorder(from, to).execute(stream, from, to);
    stream.wait();
    return block;
  }

 private:
  memory::data_type type_;
  dnnl::engine engine_;
  dnnl::stream stream_;
};

// --- the sweep -----------------------------------------------------------------------------------------------------

// One group of modules that read the same input, in every layer: W [out, in].
struct Group {
  int64_t in, out;
  bool firstInputGrad;  // whether the first layer's input gradient is needed
  Product forward, inputGrad, gradient;
  std::vector<Block> forwardWeights, inputGradWeights, inputs, outputs, gradients, moments;
  Block wideInput;  // float32, for Z
};

struct Seconds {
  double forward = 0, inputGrad = 0, head = 0, gradient = 0, moment = 0;
  double total() const { return forward + inputGrad + head + gradient + moment; }
};

class Sweep {
 public:
  explicit Sweep(const Options& options)
      : options_(options),
        matrices_(options.bf16),
        library_(matrices_.type()),
        inputGradients_(
            allocate(static_cast<size_t>(options.tokens * std::max({options.hidden, options.intermediate, options.query})) *
                     matrices_.elementBytes())) {
    addGroup(options.hidden, options.qkv, false);
    addGroup(options.query, options.hidden, true);
    addGroup(options.hidden, 2 * options.intermediate, true);
    addGroup(options.intermediate, options.hidden, true);
    prepareHead();
  }

  Seconds run() {
    Seconds seconds;
    const auto layers = static_cast<size_t>(options_.layers);
    double mark = now();
    const auto lap = [&mark](double& part) {
      const double time = now();
      part += time - mark;
      mark = time;
    };
    for (size_t layer = 0; layer < layers; ++layer) {
      for (Group& group : groups_)
        group.forward.run(group.inputs[layer].get(), group.forwardWeights[layer].get(), group.outputs[layer].get());
    }
    lap(seconds.forward);
    head(chunk_);
    lap(seconds.head);
    for (size_t layer = layers; layer-- > 0;) {
      for (size_t index = groups_.size(); index-- > 0;) {
        Group& group = groups_[index];
        const void* outputGrad = group.outputs[layer].get();
        if (layer > 0 || group.firstInputGrad)
          group.inputGrad.run(outputGrad, group.inputGradWeights[layer].get(), inputGradients_.get());
        lap(seconds.inputGrad);
        if (!options_.collect) continue;
        group.gradient.run(outputGrad, group.inputs[layer].get(), group.gradients[layer].get());
        lap(seconds.gradient);
        const int in = static_cast<int>(group.in);
        cblas_ssyrk(CblasRowMajor, CblasLower, CblasTrans, in, static_cast<int>(options_.tokens), 1.0f,
                    static_cast<const float*>(group.wideInput.get()), in, 1.0f, static_cast<float*>(group.moments[layer].get()),
                    in);
        lap(seconds.moment);
      }
    }
    return seconds;
  }

  // Of a sweep; Z at half of a full product's work.
  double flops() const {
    double flops =
        4.0 * static_cast<double>(options_.labels) * static_cast<double>(options_.vocab) * static_cast<double>(options_.hidden);
    for (const Group& group : groups_) {
      const double layers = static_cast<double>(options_.layers);
      flops += layers * group.forward.flops() + (group.firstInputGrad ? layers : layers - 1) * group.inputGrad.flops();
      if (!options_.collect) continue;
      flops += layers * group.gradient.flops();
      flops += layers * static_cast<double>(options_.tokens) * static_cast<double>(group.in) * static_cast<double>(group.in);
    }
    return flops;
  }

  int64_t headChunk() const { return chunk_; }

 private:
  void addGroup(int64_t in, int64_t out, bool firstInputGrad) {
    const int64_t tokens = options_.tokens;
    Group group{in,
                out,
                firstInputGrad,
                library_.product(tokens, out, in),
                library_.product(tokens, in, out),
                library_.gradient(out, in, tokens),
                {},
                {},
                {},
                {},
                {},
                {},
                Block(nullptr, std::free)};
    const float bound = 1.0f / static_cast<float>(in > 0 ? in : 1);
    const Block forward = matrices_.random(in, out, bound), inputGrad = matrices_.random(out, in, bound);
    for (int64_t layer = 0; layer < options_.layers; ++layer) {
      group.forwardWeights.push_back(library_.pack(group.forward, forward.get()));
      group.inputGradWeights.push_back(library_.pack(group.inputGrad, inputGrad.get()));
      group.inputs.push_back(matrices_.random(tokens, in, 1.0f));
      group.outputs.push_back(matrices_.random(tokens, out, 1.0f));
      if (!options_.collect) continue;
      Matrices wide(false);
      group.gradients.push_back(wide.random(out, in, 0.0f));
      group.moments.push_back(wide.random(in, in, 0.0f));
    }
    if (options_.collect) group.wideInput = Matrices(false).random(tokens, in, 1.0f);
    groups_.push_back(std::move(group));
  }

  struct HeadChunk {
    int64_t rows;
    Product forward, inputGrad;
  };

  // The fastest of several chunk sizes; the packed weights serve all of them.
  void prepareHead() {
    const int64_t labels = options_.labels, hidden = options_.hidden, vocab = options_.vocab;
    const Product forward = library_.product(labels, vocab, hidden), inputGrad = library_.product(labels, hidden, vocab);
    const float bound = 1.0f / static_cast<float>(hidden);
    headForward_ = library_.pack(forward, matrices_.random(hidden, vocab, bound).get());
    headInputGrad_ = library_.pack(inputGrad, matrices_.random(vocab, hidden, bound).get());
    headInputs_ = matrices_.random(labels, hidden, 1.0f);
    headGradients_ = matrices_.random(labels, hidden, 1.0f);
    logits_ = matrices_.random(labels, vocab, 1.0f);
    double best = 0;
    for (const int64_t chunk : {int64_t{128}, int64_t{256}, int64_t{512}, labels}) {
      if (chunk > labels || chunks_.count(chunk)) continue;
      std::vector<HeadChunk>& sizes = chunks_[chunk];
      for (const int64_t rows : {chunk, labels % chunk}) {
        if (rows > 0) sizes.push_back({rows, library_.product(rows, vocab, hidden), library_.product(rows, hidden, vocab)});
      }
      if (sizes.front().forward.weights() != forward.weights() || sizes.front().inputGrad.weights() != inputGrad.weights()) {
        chunks_.erase(chunk);  // another layout: it would need weights of its own
        continue;
      }
      std::vector<double> times;
      for (int round = 0; round < 3; ++round) {
        const double start = now();
        head(chunk);
        times.push_back(now() - start);
      }
      const double time = *std::min_element(times.begin(), times.end());
      if (best > 0 && time >= best) continue;
      best = time;
      chunk_ = chunk;
    }
  }

  void head(int64_t chunk) {
    std::vector<HeadChunk>& sizes = chunks_.at(chunk);
    for (int64_t first = 0; first < options_.labels; first += chunk) {
      HeadChunk& part = options_.labels - first >= chunk ? sizes.front() : sizes.back();
      const auto offset = static_cast<size_t>(first * options_.hidden) * matrices_.elementBytes();
      part.forward.run(static_cast<char*>(headInputs_.get()) + offset, headForward_.get(), logits_.get());
      part.inputGrad.run(logits_.get(), headInputGrad_.get(), static_cast<char*>(headGradients_.get()) + offset);
    }
  }

  Options options_;
  Matrices matrices_;
  Library library_;
  std::vector<Group> groups_;
  Block inputGradients_;  // one for all layers: a step's are short-lived too
  Block headForward_{nullptr, std::free}, headInputGrad_{nullptr, std::free}, headInputs_{nullptr, std::free},
      headGradients_{nullptr, std::free}, logits_{nullptr, std::free};
  std::map<int64_t, std::vector<HeadChunk>> chunks_;
  int64_t chunk_ = 0;
};

void limit(const Options& options) {
  Sweep sweep(options);
  sweep.run();
  std::vector<Seconds> sweeps;
  for (int64_t i = 0; i < options.sweeps; ++i) sweeps.push_back(sweep.run());
  const auto of = [&](auto part) {
    std::vector<double> values;
    for (const Seconds& seconds : sweeps) values.push_back(part(seconds));
    return median(values);
  };
  const double seconds = of([](const Seconds& s) { return s.total(); });
  std::printf(
      "{\"seconds\":%.6f,\"tokensPerSecond\":%.3f,\"gigaflops\":%.2f,\"headChunk\":%lld,\"threads\":%d,"
      "\"parts\":{\"forward\":%.6f,\"inputGrad\":%.6f,\"head\":%.6f,\"gradient\":%.6f,\"moment\":%.6f}}\n",
      seconds, static_cast<double>(options.tokens) / seconds, sweep.flops() / seconds / 1e9,
      static_cast<long long>(sweep.headChunk()), omp_get_max_threads(), of([](const Seconds& s) { return s.forward; }),
      of([](const Seconds& s) { return s.inputGrad; }), of([](const Seconds& s) { return s.head; }),
      of([](const Seconds& s) { return s.gradient; }), of([](const Seconds& s) { return s.moment; }));
}

// Bytes per second of reading 1 GB with all threads, the best of five.
void bandwidth() {
  constexpr int64_t count = int64_t{1} << 27;
  const Block block = allocate(count * sizeof(uint64_t));
  auto* values = static_cast<uint64_t*>(block.get());
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<uint64_t>(i);
  double best = 0;
  uint64_t check = 0;
  for (int round = 0; round < 5; ++round) {
    const double start = now();
    uint64_t sum = 0;
#pragma omp parallel for simd reduction(+ : sum) schedule(static)
    for (int64_t i = 0; i < count; ++i) sum += values[i];
    best = std::max(best, static_cast<double>(count) * sizeof(uint64_t) / (now() - start));
    check += sum;
  }
  std::printf("{\"bytesPerSecond\":%.0f,\"threads\":%d,\"check\":\"%llx\"}\n", best, omp_get_max_threads(),
              static_cast<unsigned long long>(check));
}

}  // namespace

int main(int count, char** arguments) {
  try {
    const Options options = parse(count, arguments);
    if (options.threads > 0) omp_set_num_threads(options.threads);
    if (options.bandwidth)
      bandwidth();
    else
      limit(options);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_limit: %s\n", error.what());
    return 1;
  }
}
