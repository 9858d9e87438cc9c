// A device that passes every call on to another one and keeps count: calls, seconds, flops and bytes by operation. Each call is
// timed with a synchronize() after it, so that an operation pays for its own work on a device that enqueues.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "core/device.h"

namespace lora_da {

struct OperationProfile {
  std::string operation;  // its name and, for products, the shape without the batch's rows: "linear 576x1536" is in x out
  int64_t calls = 0;
  double seconds = 0;
  double flops = 0;  // of products, attention and dense algebra; 0 elsewhere
  double bytes = 0;  // of the operands, each counted once per read and once per write
};

class ProfiledDevice : public Device {
 public:
  explicit ProfiledDevice(std::unique_ptr<Device> device) : device_(std::move(device)) {}

  std::vector<OperationProfile> profile() const;
  void reset() { operations_.clear(); }

  std::string name() const override { return device_->name(); }
  DType computeType() const override { return device_->computeType(); }
  int64_t passTokens() const override { return device_->passTokens(); }
  int64_t lowRankRoom() const override { return device_->lowRankRoom(); }
  // Operation by operation: a recording replayed as a whole could not be timed in parts.
  void recorded(const std::function<void()>& body) override { body(); }
  size_t recordings() const override { return 0; }

  Buffer allocate(size_t bytes, const std::string& purpose) override;
  void upload(void* device, const void* host, size_t bytes) override;
  void download(void* host, const void* device, size_t bytes) override;
  void zero(void* device, size_t bytes) override;
  void copy(void* to, const void* from, size_t bytes) override;
  void synchronize() override { device_->synchronize(); }
  size_t workspaceBytes(const StepShape& step) const override { return device_->workspaceBytes(step); }
  size_t momentWorkspaceBytes(int64_t rows, int64_t width) const override { return device_->momentWorkspaceBytes(rows, width); }
  size_t denseWorkspaceBytes(int64_t n, int64_t count) const override { return device_->denseWorkspaceBytes(n, count); }
  DeviceMemory memory() const override { return device_->memory(); }

  std::unique_ptr<Weight> prepare(const std::vector<HostTensor>& parts, WeightUses uses) override;
  void linear(const Matrix& x, const Weight& weight, const float* bias, const Matrix* down, const UpProjection* up,
              const Matrix* residual, const Matrix& y) override;
  void linearInputGrad(const Matrix& dy, const Weight& weight, const Matrix* downGrad, const Matrix* a,
                       const Matrix& dx) override;
  void matmul(Transpose ta, const Matrix& a, Transpose tb, const Matrix& b, float alpha, bool accumulate,
              const Matrix& c) override;
  void secondMoment(const Matrix& x, MomentSum sum, const Matrix& z) override;
  void squareSum(const Matrix& x, double* sums) override;

  void embed(const int32_t* ids, const Weight& table, float scale, const Matrix& x) override;
  void rmsNorm(const Matrix& x, const float* weight, float epsilon, const Matrix& y, float* rstd, const Matrix* kept) override;
  void rmsNormApply(const Matrix& x, const float* rstd, const float* weight, const Matrix& y) override;
  void rmsNormGrad(const Matrix& x, const float* rstd, const float* weight, const Matrix& dy, const Matrix& dx,
                   const Matrix* rounded) override;
  void rope(const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm, const Rotary& rotary,
            const int32_t* positions, const Matrix& out, float* rstd) override;
  void ropeGrad(const Matrix& d, const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm, const Rotary& rotary,
                const int32_t* positions, const float* rstd) override;
  void gatedMlp(const Matrix& gateUp, Activation activation, const Matrix& h) override;
  void gatedMlpGrad(const Matrix& gateUp, Activation activation, const Matrix& dh, const Matrix& h) override;
  void gatherRows(const Matrix& x, const int32_t* index, const Matrix& y) override;
  void scatterAddRows(const Matrix& x, const int32_t* index, const Matrix& y) override;
  void convert(const Matrix& x, const Matrix& y) override;

  void attention(const Matrix& q, const Matrix& k, const Matrix& v, const Sequences& sequences, const AttentionShape& shape,
                 const Matrix& out, float* lse) override;
  void attentionGrad(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out, const float* lse, const Matrix& dout,
                     const Sequences& sequences, const AttentionShape& shape, const Matrix& dq, const Matrix& dk,
                     const Matrix& dv) override;
  void attentionCached(const Matrix& q, const Matrix& keys, const Matrix& values, const AttentionShape& shape,
                       const Matrix& out) override;

  void headLoss(const Matrix& x, const Weight& head, const int32_t* targets, const float* rowScale, float* losses,
                const Matrix* dx) override;
  void sumLosses(const float* losses, const float* scale, int64_t count, double* total) override;

  void gradNorm(const std::vector<Parameter>& parameters, double* norm) override;
  void adamw(const std::vector<Parameter>& parameters, const AdamWStep* step, const double* norm, const double* loss) override;

  int64_t choleskyFactor(double* a, int64_t n) override;
  void choleskySolve(const double* factor, int64_t n, double* b, int64_t m) override;
  void choleskyInverse(double* a, int64_t n) override;
  // One at a time, so that each is timed by itself.
  int concurrency(int64_t) const override { return 1; }
  void concurrently(int64_t, int64_t items, const std::function<void(int64_t, int)>& body) override {
    for (int64_t item = 0; item < items; ++item) body(item, 0);
  }
  void mirrorLower(double* a, int64_t n) override;
  void symmetricProduct(const double* a, int64_t n, int64_t m, double alpha, double beta, double* c) override;
  void lowestEigenpairs(double* a, int64_t n, int64_t count, double* values, double* vectors) override;
  void scale(const Matrix& x, double factor) override;
  void blend(double* a, double alpha, const double* b, double beta, int64_t count) override;
  void addToDiagonal(double* a, int64_t n, double value) override;
  void scaledTranspose(const float* x, int64_t rows, int64_t cols, const double* scale, double* y) override;
  int64_t countNonFinite(const Matrix& x) override;

 private:
  struct Work {
    double flops = 0, bytes = 0;
  };
  // Seconds since some moment in the past.
  static double now();
  void record(const std::string& operation, Work work, double seconds);

  // The call's result, with its time under `operation`.
  template <class Call>
  auto timed(const std::string& operation, Work work, Call call) {
    const double start = now();
    if constexpr (std::is_void_v<decltype(call())>) {
      call();
      device_->synchronize();
      record(operation, work, now() - start);
    } else {
      auto result = call();
      device_->synchronize();
      record(operation, work, now() - start);
      return result;
    }
  }

  std::unique_ptr<Device> device_;
  std::map<std::string, OperationProfile> operations_;
};

}  // namespace lora_da
