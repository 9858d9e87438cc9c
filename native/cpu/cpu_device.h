// The CPU device: oneDNN for products, OpenBLAS/LAPACK for dense algebra, OpenMP over rows, heads and tiles for the rest.
// One engine thread calls it; its OpenMP team belongs to that thread.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/scratch.h"
#include "cpu/kernels/kernels.h"
#include "cpu/weight_pages.h"

namespace lora_da::cpu {

class CpuWeight;
struct PanelJob;
class Products;  // oneDNN primitives cached by shape (products.cpp)

class CpuDevice : public Device {
 public:
  explicit CpuDevice(const DeviceOptions& options);
  ~CpuDevice() override;

  std::string name() const override { return "cpu"; }
  DType computeType() const override { return computeType_; }
  // Activations of more would leave the caches and take memory; weights are read for enough rows at a time already.
  int64_t passTokens() const override { return 1536; }
  int64_t lowRankRoom() const override { return 0; }  // a panel takes the term along as it is
  void recorded(const std::function<void()>& body) override { body(); }
  size_t recordings() const override { return 0; }

  // memory.cpp
  Buffer allocate(size_t bytes, const std::string& purpose) override;
  void upload(void* device, const void* host, size_t bytes) override;
  void download(void* host, const void* device, size_t bytes) override;
  void zero(void* device, size_t bytes) override;
  void copy(void* to, const void* from, size_t bytes) override;
  void synchronize() override {}
  size_t workspaceBytes(const StepShape& step) const override;
  size_t momentWorkspaceBytes(int64_t rows, int64_t width) const override;  // second_moment.cpp
  size_t denseWorkspaceBytes(int64_t n, int64_t count) const override;      // dense.cpp
  DeviceMemory memory() const override;

  // weights.cpp
  std::unique_ptr<Weight> prepare(const std::vector<HostTensor>& parts, WeightUses uses) override;
  // linear.cpp
  void linear(const Matrix& x, const Weight& weight, const float* bias, const Matrix* down, const UpProjection* up,
              const Matrix* residual, const Matrix& y) override;
  void linearInputGrad(const Matrix& dy, const Weight& weight, const Matrix* downGrad, const Matrix* a,
                       const Matrix& dx) override;

  // products.cpp
  void matmul(Transpose ta, const Matrix& a, Transpose tb, const Matrix& b, float alpha, bool accumulate,
              const Matrix& c) override;

  // second_moment.cpp
  void secondMoment(const Matrix& x, MomentSum sum, const Matrix& z) override;

  // elementwise.cpp
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

  // attention.cpp
  void attention(const Matrix& q, const Matrix& k, const Matrix& v, const Sequences& sequences, const AttentionShape& shape,
                 const Matrix& out, float* lse) override;
  void attentionGrad(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out, const float* lse, const Matrix& dout,
                     const Sequences& sequences, const AttentionShape& shape, const Matrix& dq, const Matrix& dk,
                     const Matrix& dv) override;
  void attentionCached(const Matrix& q, const Matrix& keys, const Matrix& values, const AttentionShape& shape,
                       const Matrix& out) override;

  // head_loss.cpp
  void headLoss(const Matrix& x, const Weight& head, const int32_t* targets, const float* rowScale, float* losses,
                const Matrix* dx) override;
  void sumLosses(const float* losses, const float* scale, int64_t count, double* total) override;

  // optimizer.cpp
  void gradNorm(const std::vector<Parameter>& parameters, double* norm) override;
  void adamw(const std::vector<Parameter>& parameters, const AdamWStep* step, const double* norm, const double* loss) override;

  // dense.cpp
  int64_t choleskyFactor(double* a, int64_t n) override;
  void choleskySolve(const double* factor, int64_t n, double* b, int64_t m) override;
  void choleskyInverse(double* a, int64_t n) override;
  void mirrorLower(double* a, int64_t n) override;
  int concurrency(int64_t order) const override;
  void concurrently(int64_t order, int64_t items, const std::function<void(int64_t, int)>& body) override;
  void symmetricProduct(const double* a, int64_t n, int64_t m, double alpha, double beta, double* c) override;
  void lowestEigenpairs(double* a, int64_t n, int64_t count, double* values, double* vectors) override;

  // dense_elementwise.cpp
  void scale(const Matrix& x, double factor) override;
  void blend(double* a, double alpha, const double* b, double beta, int64_t count) override;
  void addToDiagonal(double* a, int64_t n, double value) override;
  void scaledTranspose(const float* x, int64_t rows, int64_t cols, const double* scale, double* y) override;
  int64_t countNonFinite(const Matrix& x) override;

 private:
  const TypedKernels& typed(DType type) const { return type == DType::bf16 ? kernels_.bf16 : kernels_.f32; }
  const TypedKernels& typed() const { return typed(computeType_); }
  void* scratch(size_t bytes) { return scratch_.reserve(*this, bytes, "scratch of the CPU device"); }

  // products.cpp
  void productIntoSlice(Transpose ta, const Matrix& a, Transpose tb, const Matrix& b, float alpha, bool accumulate,
                        const Matrix& c);
  // matmul of float64 (dense.cpp).
  void denseProduct(Transpose ta, const Matrix& a, Transpose tb, const Matrix& b, float alpha, bool accumulate, const Matrix& c);
  // second_moment.cpp
  void exactSecondMoment(const Matrix& x, const Matrix& z);
  void groupedSecondMoment(const Matrix& x, const Matrix& z);
  // x with its massive rows behind the `ordinary` others, or x itself where it has none.
  Matrix massiveRowsLast(const Matrix& x, int64_t& ordinary);
  void addRowGroups(const Matrix& x, const Matrix& z);
  void blasSecondMoment(const Matrix& x, const Matrix& z);
  // attention_grad.cpp: the bytes of its scratch
  size_t attentionBytes(const AttentionShape& shape, int64_t rows, int64_t longest) const;
  // head_loss.cpp; the bytes of its scratch
  size_t headLossBytes(int64_t rows, int64_t vocabulary) const;
  void headLossByTiles(const Matrix& x, const CpuWeight& head, const int32_t* targets, const float* rowScale, float* losses,
                       const Matrix* dx);
  // Own products with panels of weights, or oneDNN's.
  bool hasPanels() const;
  // weights.cpp
  void copyRows(const std::vector<HostTensor>& parts, CpuWeight& weight);
  void copyToPanels(const std::vector<HostTensor>& parts, bool asTheyLie, CpuWeight& weight);
  // dx = dy W from panels of its own; the weight has those of y = x W^T, in the compute type.
  void addGradPanels(CpuWeight& weight, const std::string& purpose);
  // Whether all panels that its products read are wanted, and the budget has room for them.
  bool fitsPrepacked(const CpuWeight& weight, WeightUses uses) const;
  void packForLibrary(const std::vector<HostTensor>& parts, WeightUses uses, CpuWeight& weight);
  // x [in] = the weights of one output.
  void readWeightRow(const CpuWeight& weight, int64_t output, float* x) const;
  // linear.cpp
  float* panelScratch(size_t threadFloats);
  void runPanelJob(const PanelJob& job);
  // The products with outputs [firstOutput, firstOutput + y.cols) of the weight only, or dy.cols of them; firstOutput is a
  // multiple of panelCols. Without panels all of the outputs. dx is float32.
  void linearPart(const Matrix& x, const CpuWeight& w, int64_t firstOutput, const Matrix& y);
  void linearInputGradPart(const Matrix& dy, const CpuWeight& w, int64_t firstOutput, bool accumulate, const Matrix& dx);
  void linearRow(const Matrix& x, const CpuWeight& w, const float* bias, const Matrix* down, const UpProjection* up,
                 const Matrix* residual, const Matrix& y);
  void thinProduct(const Matrix& a, const Matrix& b, float alpha, const Matrix& c);
  void outerSum(const Matrix& a, const Matrix& b, const Matrix& c);
  void libraryLinear(const Matrix& x, const CpuWeight& w, const float* bias, const Matrix* down, const UpProjection* up,
                     const Matrix* residual, const Matrix& y);
  void libraryInputGrad(const Matrix& dy, const CpuWeight& w, const Matrix* downGrad, const Matrix* a, const Matrix& dx);

  // Writes a tensor of the file, as `type`, to `target` [rows * cols] (file_tensors.cpp).
  void convertFromFile(const HostTensor& tensor, DType type, void* target);

  DType computeType_;
  int threads_;
  size_t copyBudget_;  // bytes left for copies of weights
  bool prepack_;
  WeightPages weightPages_;
  const Kernels& kernels_;
  std::unique_ptr<Products> products_;
  Scratch scratch_;
  Scratch productScratch_;  // apart from scratch_, which callers may hold across a product
  Scratch panelScratch_;
  Scratch momentScratch_;                 // apart from scratch_, whose user adds the rows
  Scratch factorScratch_, sliceScratch_;  // apart: a product of spread factors may be a slice
};

}  // namespace lora_da::cpu
