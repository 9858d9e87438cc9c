// The CUDA device: cuBLASLt for products, cuSOLVER for dense algebra, own kernels for the rest. Everything goes through one
// stream, in order; what a step enqueues is recorded as a graph and replayed (queue.h).
//
// Kernels. Each .cu file opens with its operations' formulas; a kernel follows its launcher's name. Reductions have a fixed
// order, so that results repeat bit for bit; no kernel adds floating-point numbers atomically. Accumulation is float32 (float64
// where the contract says so) whatever the type of the operands.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/scratch.h"
#include "cuda/queue.h"

namespace lora_da::cuda {

class Products;  // cuBLASLt, plans cached by shape (products.h)
class Dense;     // cuSOLVER (dense.h)
class Uploads;   // pinned, double-buffered copies from the host (uploads.h)

class CudaDevice : public Device {
 public:
  // Throws Error(deviceUnavailable) saying why where the device cannot be used.
  explicit CudaDevice(const DeviceOptions& options);
  ~CudaDevice() override;

  std::string name() const override { return name_; }
  DType computeType() const override { return computeType_; }
  int64_t passTokens() const override { return 8192; }
  int64_t lowRankRoom() const override { return 64; }
  void recorded(const std::function<void()>& body) override { record_ ? queue_.recorded(body) : body(); }
  size_t recordings() const override { return queue_.graphs(); }

  // memory.cpp
  Buffer allocate(size_t bytes, const std::string& purpose) override;
  void upload(void* device, const void* host, size_t bytes) override;
  void download(void* host, const void* device, size_t bytes) override;
  void zero(void* device, size_t bytes) override;
  void copy(void* to, const void* from, size_t bytes) override;
  void synchronize() override;
  DeviceMemory memory() const override;

  // linear.cpp
  std::unique_ptr<Weight> prepare(const std::vector<HostTensor>& parts, WeightUses uses) override;
  void linear(const Matrix& x, const Weight& weight, const float* bias, const Matrix* down, const UpProjection* up,
              const Matrix* residual, const Matrix& y) override;
  void linearInputGrad(const Matrix& dy, const Weight& weight, const Matrix* downGrad, const Matrix* a,
                       const Matrix& dx) override;
  void matmul(Transpose ta, const Matrix& a, Transpose tb, const Matrix& b, float alpha, bool accumulate,
              const Matrix& c) override;

  // second_moment.cu
  size_t momentWorkspaceBytes(int64_t rows, int64_t width) const override;
  void secondMoment(const Matrix& x, MomentSum sum, const Matrix& z) override;
  void squareSum(const Matrix& x, double* sums) override;

  // norm.cu
  void rmsNorm(const Matrix& x, const float* weight, float epsilon, const Matrix& y, float* rstd, const Matrix* kept) override;
  void rmsNormApply(const Matrix& x, const float* rstd, const float* weight, const Matrix& y) override;
  void rmsNormGrad(const Matrix& x, const float* rstd, const float* weight, const Matrix& dy, const Matrix& dx,
                   const Matrix* rounded) override;

  // rope.cu
  void rope(const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm, const Rotary& rotary,
            const int32_t* positions, const Matrix& out, float* rstd) override;
  void ropeGrad(const Matrix& d, const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm, const Rotary& rotary,
                const int32_t* positions, const float* rstd) override;

  // gated_mlp.cu
  void gatedMlp(const Matrix& gateUp, Activation activation, const Matrix& h) override;
  void gatedMlpGrad(const Matrix& gateUp, Activation activation, const Matrix& dh, const Matrix& h) override;

  // rows.cu
  void embed(const int32_t* ids, const Weight& table, float scale, const Matrix& x) override;
  void gatherRows(const Matrix& x, const int32_t* index, const Matrix& y) override;
  void scatterAddRows(const Matrix& x, const int32_t* index, const Matrix& y) override;
  void convert(const Matrix& x, const Matrix& y) override;

  // attention_forward.cu, attention_backward.cu, attention_cached.cu
  void attention(const Matrix& q, const Matrix& k, const Matrix& v, const Sequences& sequences, const AttentionShape& shape,
                 const Matrix& out, float* lse) override;
  void attentionGrad(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out, const float* lse, const Matrix& dout,
                     const Sequences& sequences, const AttentionShape& shape, const Matrix& dq, const Matrix& dk,
                     const Matrix& dv) override;
  void attentionCached(const Matrix& q, const Matrix& keys, const Matrix& values, const AttentionShape& shape,
                       const Matrix& out) override;

  // head_loss.cu
  size_t workspaceBytes(const StepShape& step) const override;
  void headLoss(const Matrix& x, const Weight& head, const int32_t* targets, const float* rowScale, float* losses,
                const Matrix* dx) override;
  void sumLosses(const float* losses, const float* scale, int64_t count, double* total) override;

  // optimizer.cu
  void gradNorm(const std::vector<Parameter>& parameters, double* norm) override;
  void adamw(const std::vector<Parameter>& parameters, const AdamWStep* step, const double* norm, const double* loss) override;

  // dense.cu
  size_t denseWorkspaceBytes(int64_t n, int64_t count) const override;
  int64_t choleskyFactor(double* a, int64_t n) override;
  void choleskySolve(const double* factor, int64_t n, double* b, int64_t m) override;
  void choleskyInverse(double* a, int64_t n) override;
  void mirrorLower(double* a, int64_t n) override;
  int concurrency(int64_t order) const override;
  void concurrently(int64_t order, int64_t items, const std::function<void(int64_t, int)>& body) override;
  void symmetricProduct(const double* a, int64_t n, int64_t m, double alpha, double beta, double* c) override;
  void lowestEigenpairs(double* a, int64_t n, int64_t count, double* values, double* vectors) override;

  // dense_elementwise.cu
  void scale(const Matrix& x, double factor) override;
  void blend(double* a, double alpha, const double* b, double beta, int64_t count) override;
  void addToDiagonal(double* a, int64_t n, double value) override;
  void scaledTranspose(const float* x, int64_t rows, int64_t cols, const double* scale, double* y) override;
  int64_t countNonFinite(const Matrix& x) override;

  Queue& queue() { return queue_; }

 private:
  // head_loss.cu: the bytes of its scratch
  size_t headLossBytes(int64_t rows, int64_t vocabulary) const;
  // An operation's scratch is free for the next one, since the stream keeps their order; an operation that calls another one
  // keeps a Scratch of its own.
  void* scratch(size_t bytes) { return scratch_.reserve(*this, bytes, "scratch of the CUDA device"); }

  std::string name_;
  DType computeType_;
  bool record_;
  Queue queue_;
  Scratch scratch_;
  Scratch headScratch_;  // apart from scratch_, which the products inside of headLoss may use
  std::unique_ptr<Uploads> uploads_;
  std::unique_ptr<Products> products_;
  std::unique_ptr<Dense> dense_;
};

}  // namespace lora_da::cuda
