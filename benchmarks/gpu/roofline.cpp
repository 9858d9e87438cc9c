// Every operation of core/device.h at the shapes of Llama-2-7B: time, GB/s or TFLOP/s, and the share of what the card can do.
//
//   bench_gpu_roofline [--device cuda] [--dtype bfloat16] [--size full|tiny] [--only NAME,NAME] [--results FILE]
//
// Flops and bytes are those that core/profiled_device.h counts: operands once per read and once per write. An operation is held
// against the bandwidth of a copy on the device measured in the same run, or, where that would take less time, against the peak
// of products (card.h); float64 operations against a measured float64 product. Operands of a pass over 8192 tokens are larger
// than a card's cache. Operations that destroy an operand get a fresh one before each call, outside of the time.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "card.h"
#include "core/error.h"
#include "core/profiled_device.h"
#include "core/random.h"
#include "models.h"

using namespace lora_da;
using namespace lora_da::bench;

namespace {

struct Shape {
  int64_t rows, length;  // tokens of a pass, of each of its sequences
  int64_t hidden, intermediate, vocabulary;
  int32_t heads, headDim;
  int64_t rank, order, eigenpairs;  // of a square matrix of the initializations
  int64_t adapterElements;
  CardSizes card;
  Repeats repeats;
};

const Shape full{8192, 1024, 4096, 11008, 32000, 32, 128, 8, 4096, 9, 20'000'000, {}, {7, 0.02}};
const Shape tiny{64, 32, 64, 96, 256, 4, 16, 4, 48, 5, 1000, {1 << 16, 64, 32}, {1, 0}};

// One operation: what is called, and what makes it callable again where it destroys an operand.
struct Case {
  std::string name;
  std::function<void(Device&)> call;
  std::function<void()> reset;
  bool float64 = false;
};

class Roofline {
 public:
  Roofline(const Options& options, Results& results)
      : only_(options.list("--only")), shape_(options.text("--size") == "tiny" ? tiny : full), results_(results) {
    DeviceOptions wanted;
    wanted.device = options.text("--device");
    wanted.computeType = options.type();
    auto device = makeDevice(wanted);
    device_ = device.get();
    counting_ = std::make_unique<ProfiledDevice>(std::move(device));
    type_ = device_->computeType();
  }

  void run() {
    card_ = measureCard(*device_, shape_.card, shape_.repeats);
    std::printf("%s, %s; shares are of a copy's bandwidth, or of %.4g TFLOP/s: %s\n", device_->name().c_str(), nameOf(type_),
                card_.peak / 1e12, card_.peakSource.c_str());
    results_.add("copy on the device", card_.bandwidth / 1e9, "GB/s", -1, "read and written");
    results_.add("large product", card_.productRate / 1e12, "TFLOP/s", card_.productRate / card_.peak, nameOf(type_));
    results_.add("large product in float64", card_.doubleRate / 1e12, "TFLOP/s");
    products();
    thinProducts();
    elementwise();
    rows();
    attention();
    head();
    optimizer();
    statistics();
    dense();
  }

 private:
  // --- operands -----------------------------------------------------------------------------------------------

  // As many columns of room behind each row as the device wants behind the inputs of products.
  Matrix matrix(DType type, int64_t rows, int64_t cols, int64_t room = 0, float deviation = 1) {
    const Matrix made{
        array<char>(rows * (cols + room) * static_cast<int64_t>(sizeOf(type))), type, rows, cols, cols + room, room};
    fillRandom(*device_, made, deviation);
    return made;
  }
  Matrix activations(int64_t cols) { return matrix(type_, shape_.rows, cols); }
  Matrix productInput(int64_t cols) { return matrix(type_, shape_.rows, cols, device_->lowRankRoom()); }
  Matrix stream() { return matrix(DType::f32, shape_.rows, shape_.hidden); }

  template <class T>
  T* array(int64_t count) {
    memory_.push_back(device_->allocate(static_cast<size_t>(count) * sizeof(T), "operands"));
    device_->zero(memory_.back().get(), static_cast<size_t>(count) * sizeof(T));
    return static_cast<T*>(memory_.back().get());
  }
  template <class T>
  T* upload(const std::vector<T>& values) {
    T* target = array<T>(static_cast<int64_t>(values.size()));
    device_->upload(target, values.data(), values.size() * sizeof(T));
    return target;
  }
  float* ones(int64_t count) { return upload(std::vector<float>(static_cast<size_t>(count), 1.0f)); }

  const Weight& weight(int64_t out, int64_t in, WeightUses uses) {
    hostWeights_.emplace_back(static_cast<size_t>(out * in));
    std::vector<uint16_t>& values = hostWeights_.back();
    Random random(1, std::to_string(out) + "x" + std::to_string(in));
    for (uint16_t& value : values) value = floatToBf16(static_cast<float>(random.uniform(-0.03, 0.03)));
    HostTensor tensor;
    tensor.name = "weight";
    tensor.data = values.data();
    tensor.dtype = DType::bf16;
    tensor.rows = out;
    tensor.cols = in;
    weights_.push_back(device_->prepare({tensor}, uses));
    return *weights_.back();
  }

  // Operands of the cases before are not needed any more.
  void release() {
    device_->synchronize();
    memory_.clear();
    weights_.clear();
    hostWeights_.clear();
  }

  // --- measuring ----------------------------------------------------------------------------------------------

  bool wanted(const std::string& name) const {
    const auto named = [&](const std::string& part) { return name.find(part) != std::string::npos; };
    return only_.empty() || std::any_of(only_.begin(), only_.end(), named);
  }

  void measure(const Case& tested) {
    if (!wanted(tested.name)) return;
    try {
      const OperationProfile work = count(tested);
      const double seconds = secondsOf(
          *device_, shape_.repeats, [&] { tested.call(*device_); }, tested.reset);
      report(tested, work, seconds);
    } catch (const Error& error) {
      if (error.code() == code::outOfMemory) {
        results_.skip(tested.name, error.what());
      } else {
        results_.fail(tested.name, error.what());
      }
    }
  }

  OperationProfile count(const Case& tested) {
    if (tested.reset) tested.reset();
    counting_->reset();
    tested.call(*counting_);
    OperationProfile total;
    for (const OperationProfile& entry : counting_->profile()) {
      total.flops += entry.flops;
      total.bytes += entry.bytes;
    }
    return total;
  }

  void report(const Case& tested, const OperationProfile& work, double seconds) {
    const double peak = tested.float64 ? card_.doubleRate : card_.peak;
    const bool byFlops = work.flops / peak > work.bytes / card_.bandwidth;
    const double rate = (byFlops ? work.flops : work.bytes) / seconds;
    char detail[96];
    std::snprintf(detail, sizeof detail, "%.4f ms, %.4g GFLOP, %.4g GB", seconds * 1e3, work.flops / 1e9, work.bytes / 1e9);
    results_.add(tested.name, rate / (byFlops ? 1e12 : 1e9), byFlops ? "TFLOP/s" : "GB/s",
                 rate / (byFlops ? peak : card_.bandwidth), detail);
  }

  // --- the operations -----------------------------------------------------------------------------------------

  void products() {
    const int64_t h = shape_.hidden, i = shape_.intermediate;
    projection("q|k|v", h, 3 * h, 3, false);
    projection("o", h, h, 1, true);
    projection("gate|up", h, 2 * i, 2, false);
    projection("down", i, h, 1, true);
  }

  void projection(const std::string& name, int64_t in, int64_t out, int64_t modules, bool residual) {
    const int64_t k = modules * shape_.rank;
    const Weight& w = weight(out, in, {true, true, false, true});
    const Matrix x = productInput(in), dy = productInput(out), low = activations(k);
    UpProjection up{matrix(type_, shape_.rank, out), {}};
    for (int64_t module = 0; module < modules; ++module) up.blocks.push_back({module * out / modules, out / modules});
    const Matrix a = matrix(type_, k, in), before = residual ? matrix(DType::f32, shape_.rows, out) : a;
    const Matrix y = residual ? matrix(DType::f32, shape_.rows, out) : activations(out);
    const Matrix dx = residual ? activations(in) : matrix(DType::f32, shape_.rows, in);
    measure({"linear, " + name, [&](Device& d) { d.linear(x, w, nullptr, &low, &up, residual ? &before : nullptr, y); }, {}});
    measure({"linear, " + name + " without LoRA",
             [&](Device& d) { d.linear(x, w, nullptr, nullptr, nullptr, residual ? &before : nullptr, y); },
             {}});
    measure({"linearInputGrad, " + name, [&](Device& d) { d.linearInputGrad(dy, w, &low, &a, dx); }, {}});
    release();
  }

  void thinProducts() {
    const int64_t h = shape_.hidden, i = shape_.intermediate, k = shape_.rank;
    const Matrix x = productInput(h), dy = productInput(i), low = activations(k);
    const Matrix a = matrix(type_, k, h), up = matrix(type_, k, i);
    const Matrix aGrad = matrix(DType::f32, k, h), upGrad = matrix(DType::f32, k, i);
    measure({"matmul, x a^T", [&](Device& d) { d.matmul(Transpose::no, x, Transpose::yes, a, 1, false, low); }, {}});
    measure({"matmul, dy up^T", [&](Device& d) { d.matmul(Transpose::no, dy, Transpose::yes, up, 1, false, low); }, {}});
    measure({"matmul, down^T dy", [&](Device& d) { d.matmul(Transpose::yes, low, Transpose::no, dy, 1, true, upGrad); }, {}});
    measure({"matmul, ddown^T x", [&](Device& d) { d.matmul(Transpose::yes, low, Transpose::no, x, 1, true, aGrad); }, {}});
    release();
  }

  void elementwise() {
    const Matrix x = stream(), y = productInput(shape_.hidden), kept = activations(shape_.hidden), dx = stream();
    const Matrix rounded = productInput(shape_.hidden);
    const float* weights = ones(shape_.hidden);
    float* rstd = ones(shape_.rows);
    measure({"rmsNorm", [&](Device& d) { d.rmsNorm(x, weights, 1e-5f, y, rstd, &kept); }, {}});
    measure({"rmsNormApply", [&](Device& d) { d.rmsNormApply(kept, rstd, weights, y); }, {}});
    measure({"rmsNormGrad", [&](Device& d) { d.rmsNormGrad(kept, rstd, weights, x, dx, &rounded); }, {}});
    measure({"convert", [&](Device& d) { d.convert(x, kept); }, {}});
    release();

    const Matrix gateUp = productInput(2 * shape_.intermediate), hidden = productInput(shape_.intermediate);
    const Matrix hiddenGrad = activations(shape_.intermediate);
    measure({"gatedMlp", [&](Device& d) { d.gatedMlp(gateUp, Activation::silu, hidden); }, {}});
    measure({"gatedMlpGrad", [&](Device& d) { d.gatedMlpGrad(gateUp, Activation::silu, hiddenGrad, hidden); }, {}});
    release();
    rotary();
  }

  void rotary() {
    const Matrix qkv = activations(3 * shape_.hidden), raw = activations(shape_.hidden);
    const Matrix q = qkv.columns(0, shape_.hidden);
    const int64_t pairs = shape_.headDim / 2;
    const Rotary table{ones(shape_.length * pairs), ones(shape_.length * pairs), pairs};
    std::vector<int32_t> places(static_cast<size_t>(shape_.rows));
    for (size_t i = 0; i < places.size(); ++i) places[i] = static_cast<int32_t>(static_cast<int64_t>(i) % shape_.length);
    const int32_t* positions = upload(places);
    float* rstd = ones(shape_.rows * shape_.heads);
    const HeadNorm none, norm{ones(shape_.headDim), 1e-5f};
    measure({"rope", [&](Device& d) { d.rope(q, shape_.heads, shape_.headDim, none, table, positions, q, nullptr); }, {}});
    measure(
        {"ropeGrad", [&](Device& d) { d.ropeGrad(q, raw, shape_.heads, shape_.headDim, none, table, positions, nullptr); }, {}});
    measure({"rope with head norm",
             [&](Device& d) { d.rope(raw, shape_.heads, shape_.headDim, norm, table, positions, q, rstd); },
             {}});
    measure({"ropeGrad with head norm",
             [&](Device& d) { d.ropeGrad(q, raw, shape_.heads, shape_.headDim, norm, table, positions, rstd); },
             {}});
    release();
  }

  void rows() {
    const Weight& table = weight(shape_.vocabulary, shape_.hidden, {false, false, true, false});
    const Matrix x = stream(), y = activations(shape_.hidden), from = activations(shape_.hidden), added = stream();
    std::vector<int32_t> ids(static_cast<size_t>(shape_.rows)), order(ids.size());
    Random random(1, "ids");
    for (size_t i = 0; i < ids.size(); ++i) {
      ids[i] = static_cast<int32_t>(random.next() % static_cast<uint64_t>(shape_.vocabulary));
      order[i] = static_cast<int32_t>(ids.size() - 1 - i);
    }
    const int32_t *deviceIds = upload(ids), *index = upload(order);
    measure({"embed", [&](Device& d) { d.embed(deviceIds, table, 1, x); }, {}});
    measure({"gatherRows", [&](Device& d) { d.gatherRows(from, index, y); }, {}});
    measure({"scatterAddRows", [&](Device& d) { d.scatterAddRows(added, index, x); }, {}});
    release();
  }

  Sequences sequences() {
    Sequences made;
    std::vector<int32_t> first, end;
    for (int64_t row = 0; row < shape_.rows; ++row) {
      const int64_t start = row / shape_.length * shape_.length;
      if (row == start) made.hostStarts.push_back(static_cast<int32_t>(start));
      first.push_back(static_cast<int32_t>(start));
      end.push_back(static_cast<int32_t>(std::min(shape_.rows, start + shape_.length)));
    }
    made.hostStarts.push_back(static_cast<int32_t>(shape_.rows));
    made.rowFirst = upload(first);
    made.rowEnd = upload(end);
    return made;
  }

  void attention() {
    const int64_t h = shape_.hidden;
    const Matrix qkv = activations(3 * h), grad = activations(3 * h), out = productInput(h), outGrad = activations(h);
    const Sequences bounds = sequences();
    const AttentionShape heads{shape_.heads, shape_.heads, shape_.headDim, 1 / std::sqrt(static_cast<float>(shape_.headDim)), 0};
    float* lse = array<float>(shape_.rows * shape_.heads);
    const auto part = [&](const Matrix& of, int64_t index) { return of.columns(index * h, h); };
    measure({"attention, " + std::to_string(shape_.length) + " tokens a sequence",
             [&](Device& d) { d.attention(part(qkv, 0), part(qkv, 1), part(qkv, 2), bounds, heads, out, lse); },
             {}});
    measure({"attentionGrad, " + std::to_string(shape_.length) + " tokens a sequence",
             [&](Device& d) {
               d.attentionGrad(part(qkv, 0), part(qkv, 1), part(qkv, 2), out, lse, outGrad, bounds, heads, part(grad, 0),
                               part(grad, 1), part(grad, 2));
             },
             {}});
    const Matrix keys = activations(h), values = activations(h);
    measure({"attentionCached, " + std::to_string(shape_.rows) + " tokens",
             [&](Device& d) { d.attentionCached(part(qkv, 0).rowRange(0, 1), keys, values, heads, out.rowRange(0, 1)); },
             {}});
    release();
  }

  void head() {
    const Weight& w = weight(shape_.vocabulary, shape_.hidden, {true, true, false, false});
    const Matrix x = activations(shape_.hidden), dx = stream();
    const int32_t* targets = upload(std::vector<int32_t>(static_cast<size_t>(shape_.rows), 7));
    const float* scale = ones(shape_.rows);
    float* losses = array<float>(shape_.rows);
    double* total = array<double>(1);
    measure({"headLoss with gradient", [&](Device& d) { d.headLoss(x, w, targets, scale, losses, &dx); }, {}});
    measure({"headLoss", [&](Device& d) { d.headLoss(x, w, targets, scale, losses, nullptr); }, {}});
    measure({"sumLosses", [&](Device& d) { d.sumLosses(losses, scale, shape_.rows, total); }, {}});
    release();
  }

  void optimizer() {
    const int64_t count = shape_.adapterElements;
    Parameter parameter{array<float>(count), array<float>(count), array<float>(count), array<float>(count), nullptr, count};
    if (type_ != DType::f32) parameter.shadow = array<uint16_t>(count);
    AdamWStep step;
    step.learningRate = 1e-4f;
    step.maxGradNorm = 1;
    const auto* deviceStep = upload(std::vector<AdamWStep>{step});
    auto *norm = array<double>(1), *loss = array<double>(1);
    measure({"gradNorm", [&](Device& d) { d.gradNorm({parameter}, norm); }, {}});
    measure({"adamw", [&](Device& d) { d.adamw({parameter}, deviceStep, norm, loss); }, {}});
    release();
  }

  void statistics() {
    const int64_t h = shape_.hidden;
    const Matrix x = activations(h), dy = activations(3 * h);
    const Matrix gradient = matrix(DType::f32, 3 * h, h), moment = matrix(DType::f64, h, h);
    auto* sums = array<double>(3 * h);
    measure({"matmul, G += dy^T x", [&](Device& d) { d.matmul(Transpose::yes, dy, Transpose::no, x, 1, true, gradient); }, {}});
    measure({"secondMoment", [&](Device& d) { d.secondMoment(x, MomentSum::grouped, moment); }, {}, true});
    measure({"squareSum", [&](Device& d) { d.squareSum(dy, sums); }, {}});
    release();
  }

  void dense() {
    const int64_t n = shape_.order, count = n * n;
    const Matrix x = matrix(DType::f64, n, n, 0, 1 / std::sqrt(static_cast<float>(n)));
    auto *definite = array<double>(count), *work = array<double>(count), *factor = array<double>(count);
    auto *values = array<double>(shape_.eigenpairs), *vectors = array<double>(shape_.eigenpairs * n);
    device_->symmetricProduct(x.as<double>(), n, n, 1, 0, definite);
    device_->addToDiagonal(definite, n, 1);
    const auto copyTo = [&](double* target, const double* source) {
      return [=] { device_->copy(target, source, static_cast<size_t>(count) * sizeof(double)); };
    };
    const std::string of = " of order " + std::to_string(n);
    measure({"choleskyFactor" + of, [&](Device& d) { d.choleskyFactor(work, n); }, copyTo(work, definite), true});
    copyTo(factor, definite)();
    device_->choleskyFactor(factor, n);
    measure({"choleskySolve" + of, [&](Device& d) { d.choleskySolve(factor, n, work, n); }, copyTo(work, definite), true});
    measure({"choleskyInverse" + of, [&](Device& d) { d.choleskyInverse(work, n); }, copyTo(work, factor), true});
    measure({"symmetricProduct" + of, [&](Device& d) { d.symmetricProduct(x.as<double>(), n, n, 1, 0, work); }, {}, true});
    measure({"lowestEigenpairs" + of, [&](Device& d) { d.lowestEigenpairs(work, n, shape_.eigenpairs, values, vectors); },
             copyTo(work, definite), true});
    measure({"mirrorLower" + of, [&](Device& d) { d.mirrorLower(work, n); }, {}, true});
    measure({"blend" + of, [&](Device& d) { d.blend(work, 0.5, definite, 0.5, count); }, {}, true});
    measure({"addToDiagonal" + of, [&](Device& d) { d.addToDiagonal(work, n, 1e-6); }, {}, true});
    measure({"scale" + of, [&](Device& d) { d.scale(x, 1.0); }, {}, true});
    measure({"countNonFinite" + of, [&](Device& d) { d.countNonFinite(x); }, {}, true});
    const Matrix gradient = matrix(DType::f32, n, n);
    measure({"scaledTranspose" + of, [&](Device& d) { d.scaledTranspose(gradient.as<float>(), n, n, vectors, work); }, {}, true});
    release();
  }

  std::vector<std::string> only_;
  Shape shape_;
  Results& results_;
  std::unique_ptr<ProfiledDevice> counting_;
  Device* device_;  // the one under counting_
  DType type_;
  Card card_;
  std::vector<Buffer> memory_;
  std::vector<std::vector<uint16_t>> hostWeights_;
  std::vector<std::unique_ptr<Weight>> weights_;
};

}  // namespace

int main(int count, char** arguments) {
  try {
    const Options options(count, arguments,
                          {{"--device", "cuda"}, {"--dtype", "bfloat16"}, {"--size", "full"}, {"--only", ""}, {"--results", ""}});
    Results results(options.text("--results"));
    Roofline(options, results).run();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_gpu_roofline: %s\n", error.what());
    return 1;
  }
}
