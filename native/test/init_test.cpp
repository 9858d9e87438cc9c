#include <doctest/doctest.h>

#include <limits>
#include <set>

#include "core/error.h"
#include "init/initializer.h"
#include "init/lanczos.h"
#include "test_dense.h"
#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

// The statistics of one module, made from random inputs and output gradients of `tokens` tokens.
struct Statistics {
  int64_t out, in;
  std::vector<float> gradient;
  std::vector<double> moment;
  std::vector<double> outputFactor;
};

Statistics randomStatistics(int64_t out, int64_t in, int64_t tokens, std::mt19937_64& random) {
  const Dense z = randomMatrix(tokens, in, random), dy = randomMatrix(tokens, out, random, 0.1);
  const Dense moment = product(transpose(z), z), gradient = product(transpose(dy), z);
  Statistics result{out, in, {}, {}, std::vector<double>(static_cast<size_t>(out))};
  for (const Real x : gradient.data) result.gradient.push_back(static_cast<float>(x / tokens));
  for (const Real x : moment.data) result.moment.push_back(static_cast<float>(x / tokens));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < out; ++j) result.outputFactor[j] += static_cast<double>(dy(t, j) * dy(t, j) / tokens);
  }
  return result;
}

// Outlier channels (diagonal of Z from 1e-4 to 1e4), and output gradients so small that the damping decides alone.
Statistics harshStatistics(int64_t out, int64_t in, std::mt19937_64& random) {
  Statistics s = randomStatistics(out, in, 3 * in, random);
  const auto channel = [&](int64_t i) { return std::pow(10.0, -2 + 4.0 * static_cast<double>((i * 7) % in) / (in - 1)); };
  for (int64_t i = 0; i < in; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      s.moment[i * in + j] = static_cast<float>(s.moment[i * in + j] * channel(i) * channel(j));
      s.moment[j * in + i] = s.moment[i * in + j];
    }
    for (int64_t j = 0; j < out; ++j) s.gradient[j * in + i] = static_cast<float>(s.gradient[j * in + i] * channel(i) * 1e-5);
  }
  for (double& y : s.outputFactor) y *= 1e-10;
  return s;
}

struct Result {
  Factors factors;
  ModuleReport report;
};

struct Engine {
  std::unique_ptr<Device> device;
  InitializationWorkspace workspace{*device};
  InputMoment moment;
  std::unique_ptr<DeviceVector<double>> z;

  explicit Engine(const TestDevice& tested) : device(tested.make(DType::f32)) {}
  void reset(const Statistics& s, size_t modules, const std::string& module) {
    z = std::make_unique<DeviceVector<double>>(*device, s.moment);
    moment.reset(z->data(), s.in, modules, module);
  }
  Result run(const char* name, const Statistics& s, int64_t rank, const InitializationOptions& options,
             const std::string& module = "layer.q") {
    reset(s, 1, module);
    return runShared(name, s, rank, options, module);
  }
  Result runShared(const char* name, const Statistics& s, int64_t rank, const InitializationOptions& options,
                   const std::string& module) {
    const DeviceVector<float> gradient(*device, s.gradient);
    InitializationInput input{module, s.out, s.in, rank, gradient.data(), &moment, s.outputFactor.data(), options};
    Result result;
    findInitializer(name).initialize(input, workspace, result.factors, result.report);
    return result;
  }
};

InitializationOptions someOptions() {
  InitializationOptions options;
  options.population = 100;
  return options;
}

struct Expected {
  Dense a0, b0;  // [rank, in], [rank, out], not divided by sqrt(gamma)
  double sigma;
  std::vector<Real> eigenvalues;
  double conditionNumber;
};

// LoRA-DA in extended precision.
Expected expectedLoraDa(const Statistics& s, int64_t rank, const InitializationOptions& options) {
  const Dense moment(s.in, s.in, s.moment.data()), gradient(s.out, s.in, s.gradient.data());
  const Dense damped = sum(1, moment, options.damping, identity(s.in)), dampedInverse = inverse(damped);
  Dense delta = product(dampedInverse, transpose(gradient));
  Real sumInverse = 0;
  for (int64_t j = 0; j < s.out; ++j) {
    const Real yinv = 1 / (static_cast<Real>(s.outputFactor[j]) + options.outputDamping.value_or(options.damping));
    sumInverse += yinv;
    for (int64_t i = 0; i < s.in; ++i) delta(i, j) *= -yinv;
  }
  const Real sigma = options.normalizeDelta ? std::sqrt(eigenpairs(product(delta, transpose(delta))).values.back()) : 1;
  delta = sum(1 / sigma, delta, 0, delta);
  const Dense omega = sum(-options.biasWeight, product(delta, transpose(delta)),
                          options.varianceWeight * sumInverse / options.population / (sigma * sigma), dampedInverse);
  const Eigenpairs pairs = eigenpairs(omega), spectrum = eigenpairs(damped);
  const Dense a0 = firstRows(pairs.vectors, rank);
  return {a0, product(a0, delta), static_cast<double>(sigma), pairs.values,
          static_cast<double>(spectrum.values.back() / spectrum.values.front())};
}

double productError(const Factors& factors, const Expected& expected, const Statistics& s, int64_t rank, double gamma) {
  const Dense a(rank, s.in, factors.a.data()), b(s.out, rank, factors.b.data());
  const Dense wanted = product(transpose(expected.b0), expected.a0);
  return difference(sum(gamma, product(b, a), 0, wanted), wanted) / norm(wanted);
}

void checkAgainstExpected(const Result& result, const Statistics& s, int64_t rank, const InitializationOptions& options,
                          double tolerance) {
  const Expected expected = expectedLoraDa(s, rank, options);
  CHECK(rowSpaceDistance(expected.a0, Dense(rank, s.in, result.factors.a.data())) < tolerance);
  CHECK(productError(result.factors, expected, s, rank, options.gamma) < tolerance);
  CHECK(result.report.sigma == doctest::Approx(expected.sigma).epsilon(1e-9));
  CHECK(result.report.conditionNumber < 1.001 * expected.conditionNumber);
  CHECK(result.report.conditionNumber > 0.7 * expected.conditionNumber);
  const double largest = static_cast<double>(std::max(-expected.eigenvalues.front(), expected.eigenvalues.back()));
  CHECK(std::abs(result.report.gap - static_cast<double>(expected.eigenvalues[rank] - expected.eigenvalues[rank - 1])) <
        1e-9 * largest);
}

template <class Body>
std::pair<std::string, std::string> errorOf(Body body) {
  try {
    body();
  } catch (const Error& error) {
    return {error.code(), error.what()};
  }
  return {"", "no error"};
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

DEVICE_TEST_CASE("LoRA-DA agrees with extended precision") {
  Engine engine(tested);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  for (const auto& [out, in] : std::vector<std::pair<int64_t, int64_t>>{{17, 23}, {23, 23}, {37, 23}, {1, 9}}) {
    const Statistics s = randomStatistics(out, in, 4 * in, random);
    InitializationOptions options = someOptions();
    checkAgainstExpected(engine.run("lora-da", s, 1, options), s, 1, options, 1e-5);
    options.biasWeight = 2, options.gamma = 16, options.damping = 1e-2, options.varianceWeight = 0.5,
    options.outputDamping = 1e-4;
    checkAgainstExpected(engine.run("lora-da", s, 4, options), s, 4, options, 1e-5);
    options.normalizeDelta = false;
    checkAgainstExpected(engine.run("lora-da", s, 4, options), s, 4, options, 1e-5);
  }
}

DEVICE_TEST_CASE("LoRA-DA agrees with extended precision where channels span eight orders and damping decides yinv") {
  Engine engine(tested);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  for (const int64_t out : {19, 41}) {
    const Statistics s = harshStatistics(out, 29, random);
    const InitializationOptions options = someOptions();
    const Result result = engine.run("lora-da", s, 3, options);
    checkAgainstExpected(result, s, 3, options, 1e-5);
    CHECK(result.report.medianOutputOverDamping < 1e-4);
  }
}

DEVICE_TEST_CASE("each row's entry of largest magnitude is positive") {
  Engine engine(tested);
  std::mt19937_64 random(freshSeed());
  const Statistics s = randomStatistics(17, 23, 92, random);
  const Result result = engine.run("lora-da", s, 6, someOptions());
  for (int64_t k = 0; k < 6; ++k) {
    const float* row = result.factors.a.data() + k * 23;
    CHECK(*std::max_element(row, row + 23, [](float x, float y) { return std::abs(x) < std::abs(y); }) > 0);
  }
}

DEVICE_TEST_CASE("A has orthonormal rows once sqrt(gamma) is taken back") {
  Engine engine(tested);
  std::mt19937_64 random(freshSeed());
  const Statistics s = randomStatistics(17, 23, 92, random);
  const InitializationOptions options = someOptions();
  const Dense a(6, 23, engine.run("lora-da", s, 6, options).factors.a.data());
  CHECK(difference(sum(options.gamma, product(a, transpose(a)), 0, identity(6)), identity(6)) < 1e-6);
}

DEVICE_TEST_CASE("modules of a group share one input moment, and what they get does not depend on it") {
  Engine engine(tested);
  std::mt19937_64 random(freshSeed());
  const Statistics q = randomStatistics(17, 23, 92, random);
  Statistics k = randomStatistics(9, 23, 92, random);
  k.moment = q.moment;
  engine.reset(q, 2, "layer.q");
  engine.runShared("lora-da", q, 4, someOptions(), "layer.q");
  const Result shared = engine.runShared("lora-da", k, 4, someOptions(), "layer.k");
  Engine fresh(tested);
  const Result alone = fresh.run("lora-da", k, 4, someOptions(), "layer.k");
  CHECK(shared.factors.a == alone.factors.a);
  CHECK(shared.factors.b == alone.factors.b);
}

DEVICE_TEST_CASE("only the lower triangle of Z is read") {
  Engine engine(tested);
  std::mt19937_64 random(freshSeed());
  Statistics s = randomStatistics(17, 75, 300, random);
  const Result full = engine.run("lora-da", s, 4, someOptions());
  for (int64_t i = 0; i < 75; ++i) {
    for (int64_t j = i + 1; j < 75; ++j) s.moment[i * 75 + j] = std::numeric_limits<float>::quiet_NaN();
  }
  CHECK(engine.run("lora-da", s, 4, someOptions()).factors.a == full.factors.a);
}

DEVICE_TEST_CASE("scaling channels by powers of two changes no bit of a Cholesky solution, so equilibration would gain nothing") {
  Engine engine(tested);
  std::mt19937_64 random(freshSeed());
  const int64_t n = 150, m = 37;
  const Dense x = randomMatrix(n, n + 9, random);
  const std::vector<double> matrix = product(x, transpose(x)).toDouble(), right = randomMatrix(n, m, random).toDouble();
  const DeviceVector<double> a(*engine.device, matrix), b(*engine.device, right);
  DeviceVector<double> scaledA(*engine.device, matrix), scaledB(*engine.device, right);
  const auto scale = [](int64_t i) { return std::ldexp(1.0, static_cast<int>(i * 11 % 41) - 20); };
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) scaledA.edit()[i * n + j] *= scale(i) * scale(j);
    for (int64_t j = 0; j < m; ++j) scaledB.edit()[i * m + j] *= scale(i);
  }
  REQUIRE(engine.device->choleskyFactor(a.data(), n) == 0);
  REQUIRE(engine.device->choleskyFactor(scaledA.data(), n) == 0);
  engine.device->choleskySolve(a.data(), n, b.data(), m);
  engine.device->choleskySolve(scaledA.data(), n, scaledB.data(), m);
  engine.device->choleskyInverse(a.data(), n);
  engine.device->choleskyInverse(scaledA.data(), n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) scaledB.edit()[i * m + j] *= scale(i);
    for (int64_t j = 0; j < n; ++j) scaledA.edit()[i * n + j] *= scale(i) * scale(j);
  }
  CHECK(scaledB.host() == b.host());
  CHECK(scaledA.host() == a.host());
}

DEVICE_TEST_CASE("gradients and output factors near the end of float32's range lose nothing") {
  Engine engine(tested);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  Statistics s = randomStatistics(17, 23, 92, random);
  for (float& g : s.gradient) g *= 1e-30f;
  for (double& y : s.outputFactor) y *= 1e-60;
  InitializationOptions options = someOptions();
  options.outputDamping = 1e-62;
  checkAgainstExpected(engine.run("lora-da", s, 4, options), s, 4, options, 1e-5);
}

DEVICE_TEST_CASE("a singular Z without damping is refused by module, and says what to set") {
  Engine engine(tested);
  std::mt19937_64 random(freshSeed());
  Statistics s = randomStatistics(5, 12, 40, random);
  for (int64_t j = 0; j < 12; ++j) s.moment[7 * 12 + j] = s.moment[j * 12 + 7] = 0;
  InitializationOptions options = someOptions();
  options.damping = 0, options.outputDamping = 1e-6;
  const auto [code, message] = errorOf([&] { engine.run("lora-da", s, 2, options, "model.layers.3.mlp.down_proj"); });
  CHECK(code == code::notPositiveDefinite);
  CHECK(contains(message, "model.layers.3.mlp.down_proj"));
  CHECK(contains(message, "larger damping"));
}

DEVICE_TEST_CASE("statistics that are not finite are refused by module and name") {
  Engine engine(tested);
  std::mt19937_64 random(freshSeed());
  const Statistics good = randomStatistics(5, 12, 40, random);
  Statistics badGradient = good, badMoment = good, badOutput = good;
  badGradient.gradient[17] = std::numeric_limits<float>::quiet_NaN();
  badMoment.moment[5 * 12 + 2] = std::numeric_limits<float>::infinity();
  badOutput.outputFactor[3] = std::numeric_limits<double>::quiet_NaN();
  for (const auto& [statistics, name] : std::vector<std::pair<const Statistics*, const char*>>{
           {&badGradient, "gradient G"}, {&badMoment, "moment Z"}, {&badOutput, "ydiag"}}) {
    const auto [code, message] = errorOf([&, s = statistics] { engine.run("lora-da", *s, 2, someOptions(), "layer.up"); });
    CHECK(code == code::nonFinite);
    CHECK(contains(message, "layer.up"));
    CHECK(contains(message, name));
  }
}

DEVICE_TEST_CASE("a rank above the input width is refused") {
  Engine engine(tested);
  std::mt19937_64 random(freshSeed());
  const Statistics s = randomStatistics(5, 12, 40, random);
  const auto [code, message] = errorOf([&] { engine.run("lora-da", s, 13, someOptions(), "layer.up"); });
  CHECK(code == code::invalidArgument);
  CHECK(contains(message, "rank of at most 12"));
}

DEVICE_TEST_CASE("an output without gradient needs an output damping") {
  Engine engine(tested);
  std::mt19937_64 random(freshSeed());
  Statistics s = randomStatistics(5, 12, 40, random);
  s.outputFactor[2] = 0;
  InitializationOptions options = someOptions();
  options.outputDamping = 0;
  CHECK(contains(errorOf([&] { engine.run("lora-da", s, 2, options, "layer.up"); }).second, "layer.up: output 2"));
}

DEVICE_TEST_CASE("the full rank has no gap") {
  Engine engine(tested);
  std::mt19937_64 random(freshSeed());
  const Statistics s = randomStatistics(5, 12, 40, random);
  const Result result = engine.run("lora-da", s, 12, someOptions());
  CHECK(std::isinf(result.report.gap));
  CHECK(result.report.eigenvalues.size() == 12);
}

DEVICE_TEST_CASE("without a gradient B is zero and A follows the variance term") {
  Engine engine(tested);
  std::mt19937_64 random(freshSeed());
  Statistics s = randomStatistics(5, 12, 40, random);
  std::fill(s.gradient.begin(), s.gradient.end(), 0.0f);
  const Result result = engine.run("lora-da", s, 3, someOptions());
  CHECK(std::all_of(result.factors.b.begin(), result.factors.b.end(), [](float x) { return x == 0; }));
  Eigenpairs moment = eigenpairs(Dense(12, 12, s.moment.data()));
  Dense top(3, 12);
  for (int64_t k = 0; k < 3; ++k) {
    for (int64_t i = 0; i < 12; ++i) top(k, i) = moment.vectors(11 - k, i);
  }
  CHECK(rowSpaceDistance(top, Dense(3, 12, result.factors.a.data())) < 1e-5);
  CHECK(result.report.sigma == 0);
}

DEVICE_TEST_CASE("without a gradient and without a variance term there is nothing to start from") {
  Engine engine(tested);
  std::mt19937_64 random(freshSeed());
  Statistics s = randomStatistics(5, 12, 40, random);
  std::fill(s.gradient.begin(), s.gradient.end(), 0.0f);
  InitializationOptions options = someOptions();
  options.varianceWeight = 0;
  const auto [code, message] = errorOf([&] { engine.run("lora-da", s, 3, options, "layer.up"); });
  CHECK(code == code::invalidArgument);
  CHECK(contains(message, "layer.up: the gradient is zero"));
}

DEVICE_TEST_CASE("the population must be given") {
  Engine engine(tested);
  std::mt19937_64 random(freshSeed());
  const Statistics s = randomStatistics(5, 12, 40, random);
  CHECK(contains(errorOf([&] { engine.run("lora-da", s, 3, {}); }).second, "positive number for population"));
}

DEVICE_TEST_CASE("Lanczos finds the largest eigenvalue to the tolerance") {
  Engine engine(tested);
  const uint64_t seed = freshSeed();
  INFO("seed ", seed);
  std::mt19937_64 random(seed);
  for (const int64_t n : {1, 2, 5, 61}) {
    const Dense x = randomMatrix(n, n, random), matrix = product(x, transpose(x));
    const double expected = static_cast<double>(eigenpairs(matrix).values.back());
    const DeviceVector<double> a(*engine.device, matrix.toDouble());
    CHECK(std::abs(largestEigenvalue(engine.workspace, a.data(), n, 1e-12) - expected) < 2e-12 * expected);
  }
  const DeviceVector<double> eye(*engine.device, identity(31).toDouble()), zero(*engine.device, 31 * 31);
  CHECK(largestEigenvalue(engine.workspace, eye.data(), 31, 1e-12) == doctest::Approx(1).epsilon(1e-14));
  CHECK(largestEigenvalue(engine.workspace, zero.data(), 31, 1e-12) == 0);
}

DEVICE_TEST_CASE("plain initializations have PEFT's distributions and a zero update") {
  Engine engine(tested);
  const Statistics shape{96, 400, {}, {}, {}};
  const int64_t rank = 16;
  const auto deviation = [](const std::vector<float>& values) {
    double square = 0;
    for (const float x : values) square += static_cast<double>(x) * x;
    return std::sqrt(square / static_cast<double>(values.size()));
  };
  const Result kaiming = engine.run("kaiming", shape, rank, {}), gaussian = engine.run("gaussian", shape, rank, {}),
               orthogonal = engine.run("orthogonal", shape, rank, {});
  CHECK(*std::max_element(kaiming.factors.a.begin(), kaiming.factors.a.end()) <= 0.05f);
  CHECK(deviation(kaiming.factors.a) == doctest::Approx(0.05 / std::sqrt(3.0)).epsilon(0.05));
  CHECK(deviation(gaussian.factors.a) == doctest::Approx(1.0 / 16).epsilon(0.05));
  CHECK(deviation(kaiming.factors.b) == 0);
  CHECK(deviation(gaussian.factors.b) == 0);
  // A's rows each mix rank/2 orthonormal vectors of length rank with weights of deviation 1/10.
  CHECK(deviation(orthogonal.factors.a) == doctest::Approx(0.1 / std::sqrt(2.0)).epsilon(0.05));
  CHECK(deviation(orthogonal.factors.b) == doctest::Approx(0.1 / std::sqrt(2.0)).epsilon(0.1));
  const Dense a(rank, 400, orthogonal.factors.a.data()), b(96, rank, orthogonal.factors.b.data());
  CHECK(norm(product(b, a)) < 1e-6 * norm(b) * norm(a));
}

DEVICE_TEST_CASE("random factors depend on the seed and the module's name, and on nothing else") {
  Engine engine(tested);
  const Statistics shape{9, 33, {}, {}, {}};
  for (const char* name : {"kaiming", "gaussian", "orthogonal"}) {
    InitializationOptions options, other;
    other.seed = 43;
    const auto first = engine.run(name, shape, 4, options, "layers.0.q").factors.a;
    CHECK(engine.run(name, shape, 4, options, "layers.1.q").factors.a != first);
    CHECK(engine.run(name, shape, 4, other, "layers.0.q").factors.a != first);
    CHECK(engine.run(name, shape, 4, options, "layers.0.q").factors.a == first);
  }
}

DEVICE_TEST_CASE("an odd rank has no orthogonal initialization") {
  Engine engine(tested);
  const auto [code, message] = errorOf([&] { engine.run("orthogonal", Statistics{9, 33, {}, {}, {}}, 3, {}); });
  CHECK(code == code::invalidArgument);
  CHECK(contains(message, "even"));
}

TEST_CASE("normal numbers have the moments of a standard normal" * cpuOnly("no device takes part")) {
  Random random(1, "moments");
  double sums[4] = {};
  const int count = 200000;
  for (int i = 0; i < count; ++i) {
    const double x = random.normal();
    for (int k = 0; k < 4; ++k) sums[k] += std::pow(x, k + 1) / count;
  }
  CHECK(std::abs(sums[0]) < 0.02);
  CHECK(sums[1] == doctest::Approx(1).epsilon(0.02));
  CHECK(std::abs(sums[2]) < 0.05);
  CHECK(sums[3] == doctest::Approx(3).epsilon(0.04));
}

TEST_CASE("names in the table are unique, and an unknown one is answered with the list" * cpuOnly("no device takes part")) {
  std::set<std::string> names;
  for (const Initializer& row : initializers()) CHECK(names.insert(row.name).second);
  const auto [code, message] = errorOf([] { findInitializer("lora-xy"); });
  CHECK(code == code::invalidArgument);
  CHECK(contains(message, "lora-da, kaiming, gaussian, orthogonal"));
}
