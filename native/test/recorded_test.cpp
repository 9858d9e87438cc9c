// recorded(): work that is replayed from a recording gives what the same calls give, whatever the memory holds by then. One pass
// with every kind of operation that a step consists of, over batches of one shape.
#include <doctest/doctest.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

constexpr int64_t rows = 128, labelRows = 64, heads = 2, headDim = 12, hidden = heads * headDim, vocabulary = 61, rank = 4;

// What differs from batch to batch.
struct Content {
  std::vector<int32_t> starts, ids, positions, rowFirst, rowEnd, labelIndex, targets;
  std::vector<float> rowScale;
  AdamWStep step;

  Content(const std::vector<int32_t>& lengths, int32_t labels, float learningRate, std::mt19937_64& random) : starts{0} {
    for (const int32_t length : lengths) {
      const int32_t first = starts.back();
      starts.push_back(first + length);
      positions.resize(static_cast<size_t>(starts.back()));
      for (int32_t i = 0; i < length; ++i) positions[static_cast<size_t>(first + i)] = i;
      rowFirst.resize(positions.size(), first);
      rowEnd.resize(positions.size(), starts.back());
    }
    positions.resize(rows, 0);
    for (int32_t t = starts.back(); t < rows; ++t) rowFirst.push_back(t), rowEnd.push_back(t);
    for (int64_t t = 0; t < rows; ++t) ids.push_back(static_cast<int32_t>(random() % vocabulary));
    for (int32_t i = 0; i < labelRows; ++i) {
      labelIndex.push_back(i < labels ? (7 * i) % starts.back() : -1);
      targets.push_back(i < labels ? static_cast<int32_t>(random() % vocabulary) : 0);
      rowScale.push_back(i < labels ? 1.0f / static_cast<float>(labels) : 0.0f);
    }
    step.learningRate = learningRate;
    step.weightDecay = 0.1f;
    step.maxGradNorm = 1;
  }
};

HostTensor hostTensor(const TestMatrix& matrix) {
  return {"weight", matrix.bits().data(), matrix.type(), matrix.rows(), matrix.cols(), nullptr, nullptr};
}

// Embedding, attention block, head and loss; their backward; the update of one factor a [rank, hidden].
class Pass {
 public:
  Pass(Device& device, std::mt19937_64& random) : device_(device) {
    for (TestMatrix* matrix : {&table_, &qkvWeight_, &outWeight_, &head_}) matrix->randomize(random, 0.5);
    std::normal_distribution<float> normal(0, 0.3f);
    for (float& value : value_.edit()) value = normal(random);
    for (float& value : normWeight_.edit()) value = 1 + normal(random);
    for (size_t i = 0; i < cos_.size(); ++i) {
      const double angle = 0.01 * static_cast<double>(i);
      cos_.edit()[i] = static_cast<float>(std::cos(angle));
      sin_.edit()[i] = static_cast<float>(std::sin(angle));
    }
    embedding_ = device.prepare({hostTensor(table_)}, {false, false, true});
    qkvProjection_ = device.prepare({hostTensor(qkvWeight_)}, {true, false, false});
    outProjection_ = device.prepare({hostTensor(outWeight_)}, {true, true, false});
    headProjection_ = device.prepare({hostTensor(head_)}, {true, true, false});
    device.convert({value_.data(), DType::f32, rank, hidden, hidden}, shadow_.view());
  }

  void run(const Content& content, bool recorded) {
    ids_.edit() = content.ids;
    positions_.edit() = content.positions;
    rowFirst_.edit() = content.rowFirst;
    rowEnd_.edit() = content.rowEnd;
    labelIndex_.edit() = content.labelIndex;
    targets_.edit() = content.targets;
    rowScale_.edit() = content.rowScale;
    step_.edit()[0] = content.step;
    uploadAll();
    const auto body = [&] { enqueue(content); };
    if (recorded)
      device_.recorded(body);
    else
      body();
  }

  auto results() const {
    return std::make_tuple(y_.bits(), qkvGrad_.bits(), aGrad_.bits(), shadow_.bits(), losses_.host(), value_.host(),
                           firstMoment_.host(), secondMoment_.host(), totals_.host());
  }
  double loss() const { return totals_[0]; }

 private:
  // Before a recording, which must not hold uploads; and what the host has read counts as the device's again.
  void uploadAll() const {
    for (const auto* array : {&ids_, &positions_, &rowFirst_, &rowEnd_, &labelIndex_, &targets_}) array->data();
    for (const auto* array :
         {&rowScale_, &value_, &normWeight_, &cos_, &sin_, &rstd_, &lse_, &losses_, &firstMoment_, &secondMoment_})
      array->data();
    for (const auto* matrix : {&x_, &normed_, &qkv_, &context_, &y_, &rounded_, &labels_, &labelGrad_, &stream_, &contextGrad_,
                               &roundedGrad_, &qkvGrad_, &aGrad_, &shadow_})
      matrix->view();
    step_.data();
    totals_.data();
  }
  void enqueue(const Content& content) {
    const Matrix qkv = qkv_.view(), q = qkv.columns(0, hidden), k = qkv.columns(hidden, hidden),
                 v = qkv.columns(2 * hidden, hidden);
    const Matrix grad = qkvGrad_.view(), x = x_.view(), labelGrad = labelGrad_.view(), stream = stream_.view();
    const Rotary rotary{cos_.data(), sin_.data(), headDim / 2};
    const Sequences sequences{content.starts, rowFirst_.data(), rowEnd_.data()};
    AttentionShape shape;
    shape.heads = shape.kvHeads = heads;
    shape.headDim = headDim;
    shape.scale = 0.3f;

    device_.embed(ids_.data(), *embedding_, 1.0f, x);
    device_.rmsNorm(x, normWeight_.data(), 1e-5f, normed_.view(), rstd_.data(), nullptr);
    device_.linear(normed_.view(), *qkvProjection_, nullptr, nullptr, nullptr, nullptr, qkv);
    device_.rope(q, heads, headDim, {}, rotary, positions_.data(), q, nullptr);
    device_.rope(k, heads, headDim, {}, rotary, positions_.data(), k, nullptr);
    device_.attention(q, k, v, sequences, shape, context_.view(), lse_.data());
    device_.linear(context_.view(), *outProjection_, nullptr, nullptr, nullptr, &x, y_.view());
    device_.convert(y_.view(), rounded_.view());
    device_.gatherRows(rounded_.view(), labelIndex_.data(), labels_.view());
    device_.headLoss(labels_.view(), *headProjection_, targets_.data(), rowScale_.data(), losses_.data(), &labelGrad);

    device_.zero(stream.data, stream_.exact.size() * sizeof(float));
    device_.scatterAddRows(labelGrad, labelIndex_.data(), stream);
    device_.convert(stream, roundedGrad_.view());
    device_.linearInputGrad(roundedGrad_.view(), *outProjection_, nullptr, nullptr, contextGrad_.view());
    device_.attentionGrad(q, k, v, context_.view(), lse_.data(), contextGrad_.view(), sequences, shape, grad.columns(0, hidden),
                          grad.columns(hidden, hidden), grad.columns(2 * hidden, hidden));
    device_.ropeGrad(grad.columns(0, hidden), q, heads, headDim, {}, rotary, positions_.data(), nullptr);

    device_.zero(totals_.data(), 2 * sizeof(double));
    device_.zero(aGrad_.view().data, aGrad_.exact.size() * sizeof(float));
    device_.matmul(Transpose::yes, grad.columns(0, rank), Transpose::no, normed_.view(), 1.0f, true, aGrad_.view());
    device_.sumLosses(losses_.data(), rowScale_.data(), labelRows, totals_.data());
    const Parameter parameter{value_.data(),        aGrad_.view().as<float>(), firstMoment_.data(),
                              secondMoment_.data(), shadow_.view().data,       rank * hidden};
    device_.gradNorm({parameter}, totals_.data() + 1);
    device_.adamw({parameter}, step_.data(), totals_.data() + 1, totals_.data());
  }

  Device& device_;
  const DType type_ = device_.computeType();
  TestMatrix table_{device_, type_, vocabulary, hidden}, qkvWeight_{device_, type_, 3 * hidden, hidden},
      outWeight_{device_, type_, hidden, hidden}, head_{device_, type_, vocabulary, hidden};
  std::unique_ptr<Weight> embedding_, qkvProjection_, outProjection_, headProjection_;
  DeviceVector<int32_t> ids_{device_, rows}, positions_{device_, rows}, rowFirst_{device_, rows}, rowEnd_{device_, rows},
      labelIndex_{device_, labelRows}, targets_{device_, labelRows};
  DeviceVector<float> rowScale_{device_, labelRows}, value_{device_, rank*hidden}, normWeight_{device_, hidden},
      cos_{device_, rows*headDim / 2}, sin_{device_, rows*headDim / 2};
  DeviceVector<AdamWStep> step_{device_, 1};
  TestMatrix x_{device_, DType::f32, rows, hidden}, normed_{device_, type_, rows, hidden}, qkv_{device_, type_, rows, 3 * hidden},
      context_{device_, type_, rows, hidden}, y_{device_, DType::f32, rows, hidden}, rounded_{device_, type_, rows, hidden},
      labels_{device_, type_, labelRows, hidden};
  TestMatrix labelGrad_{device_, DType::f32, labelRows, hidden}, stream_{device_, DType::f32, rows, hidden},
      contextGrad_{device_, type_, rows, hidden}, roundedGrad_{device_, type_, rows, hidden},
      qkvGrad_{device_, type_, rows, 3 * hidden}, aGrad_{device_, DType::f32, rank, hidden},
      shadow_{device_, type_, rank, hidden};
  DeviceVector<float> rstd_{device_, rows}, lse_{device_, rows*heads}, losses_{device_, labelRows},
      firstMoment_{device_, rank*hidden}, secondMoment_{device_, rank*hidden};
  DeviceVector<double> totals_{device_, 2};
};

}  // namespace

DEVICE_TEST_CASE("a recorded pass gives other batches of its shape the bits that they have unrecorded") {
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  for (const DType type : {DType::f32, DType::bf16}) {
    CAPTURE(nameOf(type));
    const auto device = tested.make(type);
    std::mt19937_64 random(seed), sameRandom(seed);
    Pass recorded(*device, random), plain(*device, sameRandom);
    std::vector<Content> contents = {
        {{128}, 64, 0.1f, random}, {{5, 60, 1, 50}, 41, 0.02f, random}, {{1}, 1, 0.3f, random}, {{64, 64}, 63, 0.0f, random}};
    contents.push_back(contents[0]);
    int64_t step = 0;
    std::vector<double> losses;
    for (Content& content : contents) {
      content.step.step = ++step;
      recorded.run(content, true);
      plain.run(content, false);
      CHECK((recorded.results() == plain.results()));
      losses.push_back(recorded.loss());
      CHECK(losses.back() > 0);
    }
    CHECK(losses[0] != losses[1]);
    CHECK(device->recordings() == (tested.replays() ? 1 : 0));
  }
}

DEVICE_TEST_CASE("recorded work with another number in it is other work") {
  const auto device = tested.make(DType::f32);
  TestMatrix a(*device, DType::f32, 2, 2), b(*device, DType::f32, 2, 2), c(*device, DType::f32, 2, 2);
  for (int64_t i = 0; i < 4; ++i) a.set(i, 1), b.set(i, 1);
  const auto product = [&](float alpha) {
    const Matrix left = a.view(), right = b.view(), result = c.view();
    device->recorded([&] { device->matmul(Transpose::no, left, Transpose::no, right, alpha, false, result); });
    return c.at(1, 1);
  };
  CHECK(product(1) == 2);
  CHECK(product(0.5f) == 1);
  a.set(2, 5);
  CHECK(product(1) == 6);
  CHECK(product(0.5f) == 3);
}

DEVICE_TEST_CASE("a body that throws is not recorded, and the next one is") {
  const auto device = tested.make(DType::f32);
  const DeviceVector<float> x(*device, 16, 1.0f);
  float* memory = x.data();
  CHECK_THROWS_AS(device->recorded([] { throw std::runtime_error("cancelled"); }), std::runtime_error);
  device->recorded([&] { device->zero(memory, 8 * sizeof(float)); });
  CHECK(x[7] == 0);
  CHECK(x[8] == 1);
}
