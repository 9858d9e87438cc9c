#include "core/profiled_device.h"

#include <algorithm>
#include <chrono>

namespace lora_da {

namespace {

double bytesOf(const Matrix& m) {
  return static_cast<double>(m.rows) * static_cast<double>(m.cols) * static_cast<double>(sizeOf(m.dtype));
}

double bytesOf(const Matrix* m) {
  return m ? bytesOf(*m) : 0;
}

// Multiply-adds, two flops each.
double product(int64_t m, int64_t n, int64_t k) {
  return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
}

double weightBytes(const Weight& weight, DType type) {
  return static_cast<double>(weight.in) * static_cast<double>(weight.out) * static_cast<double>(sizeOf(type));
}

std::string shape(int64_t first, int64_t second) {
  return std::to_string(first) + "x" + std::to_string(second);
}

// Sums over the tokens (TN) name the result's shape, products of tokens with a matrix that matrix's as in x out. Thin: LoRA's.
std::string matmulName(Transpose ta, const Matrix& a, Transpose tb, const Matrix& b, const Matrix& c) {
  constexpr int64_t thinWidth = 64;
  const int64_t inner = ta == Transpose::no ? a.cols : a.rows;
  const bool overTokens = ta == Transpose::yes;
  const int64_t first = overTokens ? c.rows : inner;
  const std::string kind = std::string(ta == Transpose::no ? "N" : "T") + (tb == Transpose::no ? "N" : "T");
  const bool thin = a.dtype != DType::f64 && std::min(first, c.cols) <= thinWidth;
  return std::string("matmul ") + (thin ? "lora " : "") + kind + " " + shape(first, c.cols);
}

// Pairs of a query and a key that it sees.
double attentionPairs(const Sequences& sequences, int32_t window) {
  double pairs = 0;
  for (size_t s = 0; s + 1 < sequences.hostStarts.size(); ++s) {
    const double length = sequences.hostStarts[s + 1] - sequences.hostStarts[s];
    const double seen = window > 0 ? std::min<double>(window, length) : length;
    pairs += seen * (seen + 1) / 2 + (length - seen) * seen;
  }
  return pairs;
}

double parameterCount(const std::vector<Parameter>& parameters) {
  double count = 0;
  for (const Parameter& parameter : parameters) count += static_cast<double>(parameter.count);
  return count;
}

double cube(int64_t n) {
  return static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n);
}

}  // namespace

double ProfiledDevice::now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void ProfiledDevice::record(const std::string& operation, Work work, double seconds) {
  OperationProfile& entry = operations_[operation];
  ++entry.calls;
  entry.seconds += seconds;
  entry.flops += work.flops;
  entry.bytes += work.bytes;
}

std::vector<OperationProfile> ProfiledDevice::profile() const {
  std::vector<OperationProfile> entries;
  for (const auto& [operation, entry] : operations_) {
    entries.push_back(entry);
    entries.back().operation = operation;
  }
  return entries;
}

Buffer ProfiledDevice::allocate(size_t bytes, const std::string& purpose) {
  return timed("allocate", {0, static_cast<double>(bytes)}, [&] { return device_->allocate(bytes, purpose); });
}

void ProfiledDevice::upload(void* device, const void* host, size_t bytes) {
  timed("upload", {0, 2.0 * static_cast<double>(bytes)}, [&] { device_->upload(device, host, bytes); });
}

void ProfiledDevice::download(void* host, const void* device, size_t bytes) {
  timed("download", {0, 2.0 * static_cast<double>(bytes)}, [&] { device_->download(host, device, bytes); });
}

void ProfiledDevice::zero(void* device, size_t bytes) {
  timed("zero", {0, static_cast<double>(bytes)}, [&] { device_->zero(device, bytes); });
}

void ProfiledDevice::copy(void* to, const void* from, size_t bytes) {
  timed("copy", {0, 2.0 * static_cast<double>(bytes)}, [&] { device_->copy(to, from, bytes); });
}

std::unique_ptr<Weight> ProfiledDevice::prepare(const std::vector<HostTensor>& parts, WeightUses uses) {
  double bytes = 0;
  for (const HostTensor& part : parts)
    bytes += static_cast<double>(part.rows * part.cols) * static_cast<double>(sizeOf(part.dtype));
  return timed("prepare", {0, bytes}, [&] { return device_->prepare(parts, uses); });
}

void ProfiledDevice::linear(const Matrix& x, const Weight& weight, const float* bias, const Matrix* down, const UpProjection* up,
                            const Matrix* residual, const Matrix& y) {
  Work work{product(x.rows, weight.out, weight.in), bytesOf(x) + weightBytes(weight, x.dtype) + bytesOf(residual) + bytesOf(y)};
  for (size_t i = 0; down && i < up->blocks.size(); ++i) work.flops += product(down->rows, up->blocks[i].count, up->rank());
  const char* name = down ? "linear+lora " : "linear ";
  timed(name + shape(weight.in, weight.out), work, [&] { device_->linear(x, weight, bias, down, up, residual, y); });
}

void ProfiledDevice::linearInputGrad(const Matrix& dy, const Weight& weight, const Matrix* downGrad, const Matrix* a,
                                     const Matrix& dx) {
  Work work{product(dy.rows, weight.out, weight.in), bytesOf(dy) + weightBytes(weight, dy.dtype) + bytesOf(dx)};
  if (downGrad && a) work.flops += product(downGrad->rows, a->cols, a->rows);
  const char* name = downGrad ? "linearInputGrad+lora " : "linearInputGrad ";
  timed(name + shape(weight.in, weight.out), work, [&] { device_->linearInputGrad(dy, weight, downGrad, a, dx); });
}

void ProfiledDevice::matmul(Transpose ta, const Matrix& a, Transpose tb, const Matrix& b, float alpha, bool accumulate,
                            const Matrix& c) {
  const int64_t inner = ta == Transpose::no ? a.cols : a.rows;
  const Work work{product(c.rows, c.cols, inner), bytesOf(a) + bytesOf(b) + bytesOf(c) * (accumulate ? 2 : 1)};
  timed(matmulName(ta, a, tb, b, c), work, [&] { device_->matmul(ta, a, tb, b, alpha, accumulate, c); });
}

void ProfiledDevice::secondMoment(const Matrix& x, MomentSum sum, const Matrix& z) {
  const Work work{product(x.rows, x.cols, x.cols) / 2, bytesOf(x) + bytesOf(z)};
  timed("secondMoment " + std::to_string(x.cols), work, [&] { device_->secondMoment(x, sum, z); });
}

void ProfiledDevice::squareSum(const Matrix& x, double* sums) {
  timed("squareSum", {0, bytesOf(x)}, [&] { device_->squareSum(x, sums); });
}

void ProfiledDevice::embed(const int32_t* ids, const Weight& table, float scale, const Matrix& x) {
  const double rows = static_cast<double>(x.rows * x.cols) * static_cast<double>(sizeOf(computeType()));
  timed("embed", {0, rows + bytesOf(x)}, [&] { device_->embed(ids, table, scale, x); });
}

void ProfiledDevice::rmsNorm(const Matrix& x, const float* weight, float epsilon, const Matrix& y, float* rstd,
                             const Matrix* kept) {
  timed("rmsNorm", {0, bytesOf(x) + bytesOf(y) + bytesOf(kept)}, [&] { device_->rmsNorm(x, weight, epsilon, y, rstd, kept); });
}

void ProfiledDevice::rmsNormApply(const Matrix& x, const float* rstd, const float* weight, const Matrix& y) {
  timed("rmsNormApply", {0, bytesOf(x) + bytesOf(y)}, [&] { device_->rmsNormApply(x, rstd, weight, y); });
}

void ProfiledDevice::rmsNormGrad(const Matrix& x, const float* rstd, const float* weight, const Matrix& dy, const Matrix& dx,
                                 const Matrix* rounded) {
  timed("rmsNormGrad", {0, bytesOf(x) + bytesOf(dy) + 2 * bytesOf(dx) + bytesOf(rounded)},
        [&] { device_->rmsNormGrad(x, rstd, weight, dy, dx, rounded); });
}

void ProfiledDevice::rope(const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm, const Rotary& rotary,
                          const int32_t* positions, const Matrix& out, float* rstd) {
  timed("rope", {0, bytesOf(in) + bytesOf(out)}, [&] { device_->rope(in, heads, headDim, norm, rotary, positions, out, rstd); });
}

void ProfiledDevice::ropeGrad(const Matrix& d, const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm,
                              const Rotary& rotary, const int32_t* positions, const float* rstd) {
  timed("ropeGrad", {0, 2 * bytesOf(d) + (norm.weight ? bytesOf(in) : 0)},
        [&] { device_->ropeGrad(d, in, heads, headDim, norm, rotary, positions, rstd); });
}

void ProfiledDevice::gatedMlp(const Matrix& gateUp, Activation activation, const Matrix& h) {
  timed("gatedMlp", {0, bytesOf(gateUp) + bytesOf(h)}, [&] { device_->gatedMlp(gateUp, activation, h); });
}

void ProfiledDevice::gatedMlpGrad(const Matrix& gateUp, Activation activation, const Matrix& dh, const Matrix& h) {
  timed("gatedMlpGrad", {0, 2 * bytesOf(gateUp) + bytesOf(dh) + bytesOf(h)},
        [&] { device_->gatedMlpGrad(gateUp, activation, dh, h); });
}

void ProfiledDevice::gatherRows(const Matrix& x, const int32_t* index, const Matrix& y) {
  timed("gatherRows", {0, 2 * bytesOf(y)}, [&] { device_->gatherRows(x, index, y); });
}

void ProfiledDevice::scatterAddRows(const Matrix& x, const int32_t* index, const Matrix& y) {
  timed("scatterAddRows", {0, 3 * bytesOf(x)}, [&] { device_->scatterAddRows(x, index, y); });
}

void ProfiledDevice::convert(const Matrix& x, const Matrix& y) {
  timed("convert", {0, bytesOf(x) + bytesOf(y)}, [&] { device_->convert(x, y); });
}

void ProfiledDevice::attention(const Matrix& q, const Matrix& k, const Matrix& v, const Sequences& sequences,
                               const AttentionShape& shape, const Matrix& out, float* lse) {
  const double pairs = attentionPairs(sequences, shape.window) * shape.heads;
  timed("attention", {2 * 2 * pairs * shape.headDim, bytesOf(q) + bytesOf(k) + bytesOf(v) + bytesOf(out)},
        [&] { device_->attention(q, k, v, sequences, shape, out, lse); });
}

// Five products of a pair's vectors: the scores again, dp, dv, dq and dk.
void ProfiledDevice::attentionGrad(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out, const float* lse,
                                   const Matrix& dout, const Sequences& sequences, const AttentionShape& shape, const Matrix& dq,
                                   const Matrix& dk, const Matrix& dv) {
  const double pairs = attentionPairs(sequences, shape.window) * shape.heads;
  const double bytes = 2 * (bytesOf(q) + bytesOf(k) + bytesOf(v) + bytesOf(out));
  timed("attentionGrad", {5 * 2 * pairs * shape.headDim, bytes},
        [&] { device_->attentionGrad(q, k, v, out, lse, dout, sequences, shape, dq, dk, dv); });
}

void ProfiledDevice::attentionCached(const Matrix& q, const Matrix& keys, const Matrix& values, const AttentionShape& shape,
                                     const Matrix& out) {
  const double pairs = static_cast<double>(keys.rows) * shape.heads;
  timed("attentionCached", {2 * 2 * pairs * shape.headDim, bytesOf(keys) + bytesOf(values)},
        [&] { device_->attentionCached(q, keys, values, shape, out); });
}

void ProfiledDevice::headLoss(const Matrix& x, const Weight& head, const int32_t* targets, const float* rowScale, float* losses,
                              const Matrix* dx) {
  const double passes = dx ? 2 : 1;
  const Work work{passes * product(x.rows, head.out, head.in), bytesOf(x) + passes * weightBytes(head, x.dtype) + bytesOf(dx)};
  timed("headLoss " + shape(head.in, head.out), work, [&] { device_->headLoss(x, head, targets, rowScale, losses, dx); });
}

void ProfiledDevice::sumLosses(const float* losses, const float* scale, int64_t count, double* total) {
  timed("sumLosses", {0, 2.0 * sizeof(float) * static_cast<double>(count)},
        [&] { device_->sumLosses(losses, scale, count, total); });
}

void ProfiledDevice::gradNorm(const std::vector<Parameter>& parameters, double* norm) {
  timed("gradNorm", {0, sizeof(float) * parameterCount(parameters)}, [&] { device_->gradNorm(parameters, norm); });
}

// Reads the gradient; reads and writes the value and both moments.
void ProfiledDevice::adamw(const std::vector<Parameter>& parameters, const AdamWStep* step, const double* norm,
                           const double* loss) {
  timed("adamw", {0, 7 * sizeof(float) * parameterCount(parameters)}, [&] { device_->adamw(parameters, step, norm, loss); });
}

int64_t ProfiledDevice::choleskyFactor(double* a, int64_t n) {
  return timed("choleskyFactor " + std::to_string(n), {cube(n) / 3, 0}, [&] { return device_->choleskyFactor(a, n); });
}

void ProfiledDevice::choleskySolve(const double* factor, int64_t n, double* b, int64_t m) {
  timed("choleskySolve " + shape(n, m), {product(n, n, m), 0}, [&] { device_->choleskySolve(factor, n, b, m); });
}

void ProfiledDevice::choleskyInverse(double* a, int64_t n) {
  timed("choleskyInverse " + std::to_string(n), {2 * cube(n) / 3, 0}, [&] { device_->choleskyInverse(a, n); });
}

void ProfiledDevice::mirrorLower(double* a, int64_t n) {
  timed("mirrorLower " + std::to_string(n), {0, static_cast<double>(n * n) * sizeof(double)},
        [&] { device_->mirrorLower(a, n); });
}

void ProfiledDevice::symmetricProduct(const double* a, int64_t n, int64_t m, double alpha, double beta, double* c) {
  timed("symmetricProduct " + shape(n, m), {product(n, n, m) / 2, 0},
        [&] { device_->symmetricProduct(a, n, m, alpha, beta, c); });
}

// As for a reduction of the whole matrix, which a search for the lowest pairs alone saves.
void ProfiledDevice::lowestEigenpairs(double* a, int64_t n, int64_t count, double* values, double* vectors) {
  timed("lowestEigenpairs " + std::to_string(n), {4 * cube(n) / 3, 0},
        [&] { device_->lowestEigenpairs(a, n, count, values, vectors); });
}

void ProfiledDevice::scale(const Matrix& x, double factor) {
  timed("scale", {0, 2 * bytesOf(x)}, [&] { device_->scale(x, factor); });
}

void ProfiledDevice::blend(double* a, double alpha, const double* b, double beta, int64_t count) {
  timed("blend", {0, 3.0 * sizeof(double) * static_cast<double>(count)}, [&] { device_->blend(a, alpha, b, beta, count); });
}

void ProfiledDevice::addToDiagonal(double* a, int64_t n, double value) {
  timed("addToDiagonal", {0, 2.0 * sizeof(double) * static_cast<double>(n)}, [&] { device_->addToDiagonal(a, n, value); });
}

void ProfiledDevice::scaledTranspose(const float* x, int64_t rows, int64_t cols, const double* scale, double* y) {
  constexpr double elementBytes = sizeof(float) + sizeof(double);
  timed("scaledTranspose " + shape(rows, cols), {0, elementBytes * static_cast<double>(rows * cols)},
        [&] { device_->scaledTranspose(x, rows, cols, scale, y); });
}

int64_t ProfiledDevice::countNonFinite(const Matrix& x) {
  return timed("countNonFinite", {0, bytesOf(x)}, [&] { return device_->countNonFinite(x); });
}

}  // namespace lora_da
