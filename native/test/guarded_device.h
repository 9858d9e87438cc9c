// A CPU device whose memory only its operations can reach, to find on any machine what would fail on a device with memory of its
// own that works behind the host's back:
// - A device pointer is a disguised address: the host that reads or writes through it faults.
// - Operands must lie inside of one live allocation: host memory, freed memory and views that run out of it are refused by name.
// - Fresh memory holds NaNs, so that what reads it before it was written shows.
// - What download() asks for arrives with synchronize(), not before: NaNs stand there meanwhile.
// - recorded() really replays: body is called once to see what it asks for, and what was recorded the first time runs, with the
//   addresses and numbers of that time. Attention goes by the bounds in device memory, as a replayed one must.
// - It wants room behind the inputs of products and spoils it there (Device::lowRankRoom).
// Operations of concurrently() run one at a time, so that a fault is the same in each run.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/device.h"

namespace lora_da::test {

class GuardedDevice : public Device {
 public:
  explicit GuardedDevice(std::unique_ptr<Device> cpu);
  ~GuardedDevice() override;

  std::string name() const override { return "guarded-cpu"; }
  DType computeType() const override { return device_->computeType(); }
  int64_t passTokens() const override { return device_->passTokens(); }
  int64_t lowRankRoom() const override { return 8; }
  void recorded(const std::function<void()>& body) override;
  size_t recordings() const override { return recordings_.size(); }

  Buffer allocate(size_t bytes, const std::string& purpose) override;
  void upload(void* device, const void* host, size_t bytes) override;
  void download(void* host, const void* device, size_t bytes) override;
  void zero(void* device, size_t bytes) override;
  void copy(void* to, const void* from, size_t bytes) override;
  void synchronize() override;
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
  void mirrorLower(double* a, int64_t n) override;
  int concurrency(int64_t) const override { return 1; }
  void concurrently(int64_t, int64_t items, const std::function<void(int64_t, int)>& body) override {
    for (int64_t item = 0; item < items; ++item) body(item, 0);
  }
  void scale(const Matrix& x, double factor) override;
  void blend(double* a, double alpha, const double* b, double beta, int64_t count) override;
  void addToDiagonal(double* a, int64_t n, double value) override;
  void scaledTranspose(const float* x, int64_t rows, int64_t cols, const double* scale, double* y) override;
  int64_t countNonFinite(const Matrix& x) override;
  void symmetricProduct(const double* a, int64_t n, int64_t m, double alpha, double beta, double* c) override;
  void lowestEigenpairs(double* a, int64_t n, int64_t count, double* values, double* vectors) override;

 private:
  class Operands;
  class Observing;
  struct Memory;
  using Work = std::function<void()>;  // an operation with the real addresses of its operands
  struct Download {
    void* host;
    std::vector<unsigned char> bytes;
  };
  struct Recording {
    std::vector<Work> work;
    std::string fingerprint;  // operations and arguments as text
  };

  // The call of `operation` on the CPU device with the arguments translated: now, or into the recording.
  template <class Operation, class... Arguments>
  void enqueue(const char* name, Operation operation, const Arguments&... arguments);
  Operands operands(const char* name) const;
  // For what a body of recorded() must not call; the operands of the rest.
  Operands outsideOfRecording(const char* name) const;
  Recording observe(const std::function<void()>& body);

  std::unique_ptr<Device> device_;
  std::shared_ptr<Memory> memory_;
  std::vector<Download> downloads_;
  Recording* observed_ = nullptr;  // while recorded() observes
  std::map<std::string, std::vector<Work>> recordings_;
};

}  // namespace lora_da::test
