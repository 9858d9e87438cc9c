// Gradient norm and AdamW over a list of parameters, cut into chunks that do not depend on the number of threads: the norm is
// summed per chunk and then in the order of the chunks.
#include <omp.h>

#include <cmath>

#include "cpu/cpu_device.h"

namespace lora_da::cpu {

namespace {

constexpr int64_t chunkSize = 8192;

int64_t chunksOf(const Parameter& parameter) {
  return (parameter.count + chunkSize - 1) / chunkSize;
}

int64_t chunksOf(const std::vector<Parameter>& parameters) {
  int64_t chunks = 0;
  for (const Parameter& parameter : parameters) chunks += chunksOf(parameter);
  return chunks;
}

// body(parameter, first element, count, chunk) for each chunk; a thread takes consecutive chunks.
template <class Body>
void overChunks(const std::vector<Parameter>& parameters, int threads, const Body& body) {
  const int64_t total = chunksOf(parameters);
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), self = omp_get_thread_num();
    const int64_t begin = total * self / team, end = total * (self + 1) / team;
    int64_t chunk = 0;
    for (const Parameter& parameter : parameters) {
      for (int64_t first = 0; first < parameter.count; first += chunkSize, ++chunk) {
        if (chunk < begin || chunk >= end) continue;
        const int64_t left = parameter.count - first;
        body(parameter, first, left < chunkSize ? left : chunkSize, chunk);
      }
    }
  }
}

}  // namespace

void CpuDevice::gradNorm(const std::vector<Parameter>& parameters, double* norm) {
  const int64_t chunks = chunksOf(parameters);
  double* partial = static_cast<double*>(scratch(static_cast<size_t>(chunks) * sizeof(double)));
  const auto squaredNorm = kernels_.squaredNorm;
  overChunks(parameters, threads_, [&](const Parameter& parameter, int64_t first, int64_t count, int64_t chunk) {
    partial[chunk] = squaredNorm(parameter.grad + first, count);
  });
  double sum = 0;
  for (int64_t i = 0; i < chunks; ++i) sum += partial[i];
  norm[0] = std::sqrt(sum);
}

void CpuDevice::adamw(const std::vector<Parameter>& parameters, const AdamWStep* step, const double* norm, const double* loss) {
  if (!std::isfinite(norm[0]) || !std::isfinite(loss[0])) return;
  double gradScale = 1;
  if (step->maxGradNorm > 0) gradScale = std::fmin(1.0, static_cast<double>(step->maxGradNorm) / (norm[0] + 1e-6));
  const double exponent = static_cast<double>(step->step);
  const double biasCorrection1 = 1.0 - std::pow(static_cast<double>(step->beta1), exponent);
  const double biasCorrection2 = 1.0 - std::pow(static_cast<double>(step->beta2), exponent);
  const auto adamw = kernels_.adamw;
  overChunks(parameters, threads_, [&](const Parameter& parameter, int64_t first, int64_t count, int64_t) {
    uint16_t* shadow = parameter.shadow ? static_cast<uint16_t*>(parameter.shadow) + first : nullptr;
    adamw(parameter.value + first, parameter.grad + first, parameter.firstMoment + first, parameter.secondMoment + first, shadow,
          count, *step, static_cast<float>(gradScale), static_cast<float>(biasCorrection1), static_cast<float>(biasCorrection2));
  });
}

}  // namespace lora_da::cpu
