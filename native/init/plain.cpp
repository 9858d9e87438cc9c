// kaiming     PEFT's default: A as the weight of a linear layer (He et al. 2015 with a = sqrt(5), which is U(-1/sqrt(in),
// 1/sqrt(in))),
//             B zero.
// gaussian    init_lora_weights="gaussian": A normal with standard deviation 1/rank, B zero.
// orthogonal  init_lora_weights="orthogonal" (https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation): A and
// B
//             lie in complementary halves of an orthonormal basis of the rank space, so that B A = 0 though neither is zero.
#include "init/plain.h"

#include <cmath>

#include "core/error.h"

namespace lora_da {

namespace {

void clear(const InitializationInput& input, Factors& factors, ModuleReport& report) {
  factors.a.assign(static_cast<size_t>(input.rank * input.in), 0.0f);
  factors.b.assign(static_cast<size_t>(input.out * input.rank), 0.0f);
  report = ModuleReport{};
  report.module = input.module;
}

// A random orthonormal basis [n, n], a vector a row: normal rows made orthonormal by Gram and Schmidt, twice each.
std::vector<double> randomBasis(int64_t n, Random& random) {
  std::vector<double> basis(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) {
    double* row = basis.data() + i * n;
    for (int64_t k = 0; k < n; ++k) row[k] = random.normal();
    for (int64_t pass = 0; pass < 2 * i; ++pass) {
      const double* earlier = basis.data() + (pass % i) * n;
      double overlap = 0;
      for (int64_t k = 0; k < n; ++k) overlap += row[k] * earlier[k];
      for (int64_t k = 0; k < n; ++k) row[k] -= overlap * earlier[k];
    }
    double norm = 0;
    for (int64_t k = 0; k < n; ++k) norm += row[k] * row[k];
    norm = std::sqrt(norm);
    for (int64_t k = 0; k < n; ++k) row[k] /= norm;
  }
  return basis;
}

}  // namespace

void initializeKaiming(const InitializationInput& input, InitializationWorkspace&, Factors& factors, ModuleReport& report) {
  clear(input, factors, report);
  Random random(input.options.seed, input.module);
  const double bound = 1 / std::sqrt(static_cast<double>(input.in));
  for (float& value : factors.a) value = static_cast<float>(random.uniform(-bound, bound));
}

void initializeGaussian(const InitializationInput& input, InitializationWorkspace&, Factors& factors, ModuleReport& report) {
  clear(input, factors, report);
  Random random(input.options.seed, input.module);
  const double deviation = 1 / static_cast<double>(input.rank);
  for (float& value : factors.a) value = static_cast<float>(deviation * random.normal());
}

void initializeOrthogonal(const InitializationInput& input, InitializationWorkspace&, Factors& factors, ModuleReport& report) {
  const int64_t rank = input.rank, half = rank / 2;
  if (rank % 2 != 0) {
    throw Error(code::invalidArgument,
                "Expected even integer for rank with init orthogonal but received " + std::to_string(rank));
  }
  clear(input, factors, report);
  Random random(input.options.seed, input.module);
  const std::vector<double> basis = randomBasis(rank, random);
  std::vector<double> mix(static_cast<size_t>(half));

  // A[:, i] and B[i, :] mix the even and the odd basis vectors with normal weights; PEFT's factor 1/10 keeps both small.
  const auto mixRows = [&](int64_t firstRow, float* to, int64_t stride) {
    for (double& weight : mix) weight = random.normal() / 10;
    for (int64_t k = 0; k < rank; ++k) {
      double sum = 0;
      for (int64_t j = 0; j < half; ++j) sum += mix[j] * basis[(2 * j + firstRow) * rank + k];
      to[k * stride] = static_cast<float>(sum);
    }
  };
  for (int64_t i = 0; i < input.in; ++i) mixRows(0, factors.a.data() + i, input.in);
  for (int64_t i = 0; i < input.out; ++i) mixRows(1, factors.b.data() + i * rank, 1);
}

}  // namespace lora_da
