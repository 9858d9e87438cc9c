#include "guarded_device.h"

#include <cstring>
#include <optional>
#include <sstream>
#include <tuple>
#include <type_traits>

#include "core/error.h"

namespace lora_da::test {

namespace {

// No address of a process on x86-64 or AArch64 has this bit, so that an address with it is nobody's memory, while its alignment
// and arithmetic stay as they were.
constexpr uintptr_t guardBit = uintptr_t{1} << 50;
constexpr int nanByte = 0xff;  // a NaN in every floating-point type, -1 in integers

// Device memory whose size its type does not tell.
template <class T>
struct Array {
  T* data;
  int64_t count;
};

template <class T>
Array<T> array(T* data, int64_t count) {
  return {data, count};
}

struct Bounds {
  const Sequences& sequences;
  int64_t rows;
};

// Arguments as they are kept until the operation runs: by value, with real addresses. get() is what the operation takes.
template <class T>
struct Kept {
  T value;
  const T& get() const { return value; }
};

struct KeptWeight {
  const Weight* weight;
  const Weight& get() const { return *weight; }
};

struct KeptOptional {
  std::optional<Matrix> matrix;
  const Matrix* get() const { return matrix ? &*matrix : nullptr; }
};

struct KeptUpProjection {
  std::optional<UpProjection> up;
  const UpProjection* get() const { return up ? &*up : nullptr; }
};

struct KeptSequences {
  const int32_t *rowFirst, *rowEnd;
  int64_t rows;

  Sequences get() const {
    Sequences sequences;
    int32_t row = 0;
    for (; row < rows && rowEnd[row] > row; row = rowEnd[row]) sequences.hostStarts.push_back(row);
    sequences.hostStarts.push_back(row);
    sequences.rowFirst = rowFirst;
    sequences.rowEnd = rowEnd;
    return sequences;
  }
};

// What a product may leave in the room behind the rows of its input.
void spoilRoom(Device&, const Matrix& x) {
  for (int64_t row = 0; row < x.rows; ++row) {
    std::memset(x.at(row, x.cols), nanByte, static_cast<size_t>(x.room) * sizeOf(x.dtype));
  }
}

}  // namespace

// Live allocations: real address and size.
struct GuardedDevice::Memory {
  std::map<uintptr_t, size_t> sizes;

  // The allocation that holds all of the bytes, the end of one where there are none.
  bool holds(uintptr_t address, size_t bytes) const {
    auto after = sizes.upper_bound(address);
    if (after == sizes.begin()) return false;
    const auto [start, size] = *--after;
    return address - start <= size && bytes <= size - (address - start);
  }
};

// Translates the operands of one operation and writes down what they are.
class GuardedDevice::Operands {
 public:
  Operands(const char* name, const Memory& memory, std::string* fingerprint)
      : name_(name), memory_(memory), fingerprint_(fingerprint) {
    note(name);
  }

  template <class T>
  T* real(T* device, int64_t count) const {
    note(static_cast<const void*>(device), count);
    if (!device) return nullptr;
    const auto address = reinterpret_cast<uintptr_t>(device);
    size_t elementBytes = 1;
    if constexpr (!std::is_void_v<T>) elementBytes = sizeof(T);
    if (!(address & guardBit)) fail("memory of the host where memory of the device is expected");
    if (!memory_.holds(address ^ guardBit, static_cast<size_t>(count) * elementBytes)) {
      fail("an operand that does not lie inside of an allocation");
    }
    return reinterpret_cast<T*>(address ^ guardBit);
  }

  template <class T>
  Kept<T*> operator()(const Array<T>& argument) const {
    return {real(argument.data, argument.count)};
  }
  Kept<Matrix> operator()(const Matrix& argument) const {
    Matrix matrix = argument;
    note(nameOf(matrix.dtype), matrix.rows, matrix.cols, matrix.stride, matrix.room);
    const bool empty = matrix.rows == 0 || matrix.cols == 0;
    const int64_t elements = empty ? 0 : (matrix.rows - 1) * matrix.stride + matrix.cols + matrix.room;
    matrix.data = real(static_cast<char*>(matrix.data), elements * static_cast<int64_t>(sizeOf(matrix.dtype)));
    return {matrix};
  }
  KeptOptional operator()(const Matrix* argument) const {
    note(argument != nullptr);
    if (!argument) return {};
    return {(*this)(*argument).value};
  }
  KeptUpProjection operator()(const UpProjection* argument) const {
    note(argument != nullptr);
    if (!argument) return {};
    for (const UpProjection::Block& block : argument->blocks) note(block.first, block.count);
    return {UpProjection{(*this)(argument->factors).value, argument->blocks}};
  }
  KeptWeight operator()(const Weight& argument) const {
    note(static_cast<const void*>(&argument));
    return {&argument};
  }
  KeptSequences operator()(const Bounds& argument) const {
    return {real(argument.sequences.rowFirst, argument.rows), real(argument.sequences.rowEnd, argument.rows), argument.rows};
  }
  Kept<Rotary> operator()(const Rotary& argument) const {
    note(argument.pairs);
    return {{real(argument.cos, argument.pairs), real(argument.sin, argument.pairs), argument.pairs}};
  }
  Kept<HeadNorm> operator()(const HeadNorm& argument) const {
    note(argument.epsilon);
    return {{real(argument.weight, 1), argument.epsilon}};
  }
  Kept<AttentionShape> operator()(const AttentionShape& argument) const {
    note(argument.heads, argument.kvHeads, argument.headDim, argument.scale, argument.window);
    return {argument};
  }
  Kept<std::vector<Parameter>> operator()(const std::vector<Parameter>& argument) const {
    std::vector<Parameter> parameters = argument;
    for (Parameter& parameter : parameters) {
      for (float** values : {&parameter.value, &parameter.grad, &parameter.firstMoment, &parameter.secondMoment}) {
        *values = real(*values, parameter.count);
      }
      parameter.shadow = real(static_cast<uint16_t*>(parameter.shadow), parameter.count);
    }
    return {parameters};
  }
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  Kept<T> operator()(T argument) const {
    note(argument);
    return {argument};
  }
  template <class T, class = std::enable_if_t<std::is_enum_v<T>>, class = void>
  Kept<T> operator()(T argument) const {
    note(static_cast<int>(argument));
    return {argument};
  }

 private:
  template <class... Values>
  void note(const Values&... values) const {
    if (!fingerprint_) return;
    std::ostringstream text;
    text << std::hexfloat;
    ((text << values << ' '), ...);
    *fingerprint_ += text.str();
  }
  [[noreturn]] void fail(const char* what) const { throw Error(code::internal, std::string(name_) + ": " + what); }

  const char* name_;
  const Memory& memory_;
  std::string* fingerprint_;
};

// Operations go into the recording, not to the device, for as long as it lives.
class GuardedDevice::Observing {
 public:
  Observing(Recording*& observed, Recording& recording) : observed_(observed) { observed_ = &recording; }
  ~Observing() { observed_ = nullptr; }
  Observing(const Observing&) = delete;

 private:
  Recording*& observed_;
};

GuardedDevice::GuardedDevice(std::unique_ptr<Device> cpu) : device_(std::move(cpu)), memory_(std::make_shared<Memory>()) {}

GuardedDevice::~GuardedDevice() = default;

template <class Operation, class... Arguments>
void GuardedDevice::enqueue(const char* name, Operation operation, const Arguments&... arguments) {
  const Operands keep = operands(name);
  const auto work = [device = device_.get(), operation, kept = std::make_tuple(keep(arguments)...)] {
    std::apply([&](const auto&... argument) { std::invoke(operation, *device, argument.get()...); }, kept);
  };
  if (observed_)
    observed_->work.push_back(work);
  else
    work();
}

GuardedDevice::Operands GuardedDevice::operands(const char* name) const {
  return {name, *memory_, observed_ ? &observed_->fingerprint : nullptr};
}

GuardedDevice::Operands GuardedDevice::outsideOfRecording(const char* name) const {
  if (observed_) throw Error(code::internal, std::string(name) + " inside of recorded()");
  return operands(name);
}

GuardedDevice::Recording GuardedDevice::observe(const std::function<void()>& body) {
  Recording recording;
  const Observing observing(observed_, recording);
  body();
  return recording;
}

void GuardedDevice::recorded(const std::function<void()>& body) {
  outsideOfRecording("recorded");
  const std::string fingerprint = observe(body).fingerprint;
  auto found = recordings_.find(fingerprint);
  if (found == recordings_.end()) {
    Recording recording = observe(body);
    if (recording.fingerprint != fingerprint) throw Error(code::internal, "recorded work that is not the same each time");
    found = recordings_.emplace(fingerprint, std::move(recording.work)).first;
  }
  for (const Work& work : found->second) work();
}

Buffer GuardedDevice::allocate(size_t bytes, const std::string& purpose) {
  outsideOfRecording("allocate");
  const auto held = std::make_shared<Buffer>(device_->allocate(bytes, purpose));
  const auto address = reinterpret_cast<uintptr_t>(held->get());
  std::memset(held->get(), nanByte, bytes);
  memory_->sizes[address] = bytes;
  return Buffer(reinterpret_cast<void*>(address ^ guardBit), [memory = memory_, held, address](void*) {
    memory->sizes.erase(address);
    held->reset();
  });
}

void GuardedDevice::upload(void* device, const void* host, size_t bytes) {
  void* target = outsideOfRecording("upload").real(device, static_cast<int64_t>(bytes));
  device_->upload(target, host, bytes);
}

void GuardedDevice::download(void* host, const void* device, size_t bytes) {
  const auto* source =
      static_cast<const unsigned char*>(outsideOfRecording("download").real(device, static_cast<int64_t>(bytes)));
  if (bytes == 0) return;
  downloads_.push_back({host, {source, source + bytes}});
  std::memset(host, nanByte, bytes);
}

void GuardedDevice::synchronize() {
  outsideOfRecording("synchronize");
  for (const Download& download : downloads_) std::memcpy(download.host, download.bytes.data(), download.bytes.size());
  downloads_.clear();
}

void GuardedDevice::zero(void* device, size_t bytes) {
  enqueue("zero", &Device::zero, array(device, static_cast<int64_t>(bytes)), bytes);
}

void GuardedDevice::copy(void* to, const void* from, size_t bytes) {
  const auto count = static_cast<int64_t>(bytes);
  enqueue("copy", &Device::copy, array(to, count), array(from, count), bytes);
}

std::unique_ptr<Weight> GuardedDevice::prepare(const std::vector<HostTensor>& parts, WeightUses uses) {
  outsideOfRecording("prepare");
  return device_->prepare(parts, uses);
}

void GuardedDevice::linear(const Matrix& x, const Weight& weight, const float* bias, const Matrix* down, const UpProjection* up,
                           const Matrix* residual, const Matrix& y) {
  enqueue("linear", &Device::linear, x, weight, array(bias, weight.out), down, up, residual, y);
  enqueue("room of linear", spoilRoom, x);
}

void GuardedDevice::linearInputGrad(const Matrix& dy, const Weight& weight, const Matrix* downGrad, const Matrix* a,
                                    const Matrix& dx) {
  enqueue("linearInputGrad", &Device::linearInputGrad, dy, weight, downGrad, a, dx);
  enqueue("room of linearInputGrad", spoilRoom, dy);
}

void GuardedDevice::matmul(Transpose ta, const Matrix& a, Transpose tb, const Matrix& b, float alpha, bool accumulate,
                           const Matrix& c) {
  enqueue("matmul", &Device::matmul, ta, a, tb, b, alpha, accumulate, c);
}

void GuardedDevice::secondMoment(const Matrix& x, MomentSum sum, const Matrix& z) {
  enqueue("secondMoment", &Device::secondMoment, x, sum, z);
}

void GuardedDevice::squareSum(const Matrix& x, double* sums) {
  enqueue("squareSum", &Device::squareSum, x, array(sums, x.cols));
}

void GuardedDevice::embed(const int32_t* ids, const Weight& table, float scale, const Matrix& x) {
  enqueue("embed", &Device::embed, array(ids, x.rows), table, scale, x);
}

void GuardedDevice::rmsNorm(const Matrix& x, const float* weight, float epsilon, const Matrix& y, float* rstd,
                            const Matrix* kept) {
  enqueue("rmsNorm", &Device::rmsNorm, x, array(weight, x.cols), epsilon, y, array(rstd, x.rows), kept);
}

void GuardedDevice::rmsNormApply(const Matrix& x, const float* rstd, const float* weight, const Matrix& y) {
  enqueue("rmsNormApply", &Device::rmsNormApply, x, array(rstd, x.rows), array(weight, x.cols), y);
}

void GuardedDevice::rmsNormGrad(const Matrix& x, const float* rstd, const float* weight, const Matrix& dy, const Matrix& dx,
                                const Matrix* rounded) {
  enqueue("rmsNormGrad", &Device::rmsNormGrad, x, array(rstd, x.rows), array(weight, x.cols), dy, dx, rounded);
}

void GuardedDevice::rope(const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm, const Rotary& rotary,
                         const int32_t* positions, const Matrix& out, float* rstd) {
  enqueue("rope", &Device::rope, in, heads, headDim, norm, rotary, array(positions, in.rows), out, array(rstd, in.rows * heads));
}

void GuardedDevice::ropeGrad(const Matrix& d, const Matrix& in, int32_t heads, int32_t headDim, const HeadNorm& norm,
                             const Rotary& rotary, const int32_t* positions, const float* rstd) {
  enqueue("ropeGrad", &Device::ropeGrad, d, in, heads, headDim, norm, rotary, array(positions, d.rows),
          array(rstd, d.rows * heads));
}

void GuardedDevice::gatedMlp(const Matrix& gateUp, Activation activation, const Matrix& h) {
  enqueue("gatedMlp", &Device::gatedMlp, gateUp, activation, h);
}

void GuardedDevice::gatedMlpGrad(const Matrix& gateUp, Activation activation, const Matrix& dh, const Matrix& h) {
  enqueue("gatedMlpGrad", &Device::gatedMlpGrad, gateUp, activation, dh, h);
}

void GuardedDevice::gatherRows(const Matrix& x, const int32_t* index, const Matrix& y) {
  enqueue("gatherRows", &Device::gatherRows, x, array(index, y.rows), y);
}

void GuardedDevice::scatterAddRows(const Matrix& x, const int32_t* index, const Matrix& y) {
  enqueue("scatterAddRows", &Device::scatterAddRows, x, array(index, x.rows), y);
}

void GuardedDevice::convert(const Matrix& x, const Matrix& y) {
  enqueue("convert", &Device::convert, x, y);
}

void GuardedDevice::attention(const Matrix& q, const Matrix& k, const Matrix& v, const Sequences& sequences,
                              const AttentionShape& shape, const Matrix& out, float* lse) {
  enqueue("attention", &Device::attention, q, k, v, Bounds{sequences, q.rows}, shape, out, array(lse, q.rows * shape.heads));
}

void GuardedDevice::attentionGrad(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out, const float* lse,
                                  const Matrix& dout, const Sequences& sequences, const AttentionShape& shape, const Matrix& dq,
                                  const Matrix& dk, const Matrix& dv) {
  enqueue("attentionGrad", &Device::attentionGrad, q, k, v, out, array(lse, q.rows * shape.heads), dout,
          Bounds{sequences, q.rows}, shape, dq, dk, dv);
}

void GuardedDevice::attentionCached(const Matrix& q, const Matrix& keys, const Matrix& values, const AttentionShape& shape,
                                    const Matrix& out) {
  enqueue("attentionCached", &Device::attentionCached, q, keys, values, shape, out);
}

void GuardedDevice::headLoss(const Matrix& x, const Weight& head, const int32_t* targets, const float* rowScale, float* losses,
                             const Matrix* dx) {
  enqueue("headLoss", &Device::headLoss, x, head, array(targets, x.rows), array(rowScale, x.rows), array(losses, x.rows), dx);
}

void GuardedDevice::sumLosses(const float* losses, const float* scale, int64_t count, double* total) {
  enqueue("sumLosses", &Device::sumLosses, array(losses, count), array(scale, count), count, array(total, 1));
}

void GuardedDevice::gradNorm(const std::vector<Parameter>& parameters, double* norm) {
  enqueue("gradNorm", &Device::gradNorm, parameters, array(norm, 1));
}

void GuardedDevice::adamw(const std::vector<Parameter>& parameters, const AdamWStep* step, const double* norm,
                          const double* loss) {
  enqueue("adamw", &Device::adamw, parameters, array(step, 1), array(norm, 1), array(loss, 1));
}

int64_t GuardedDevice::choleskyFactor(double* a, int64_t n) {
  return device_->choleskyFactor(outsideOfRecording("choleskyFactor").real(a, n * n), n);
}

void GuardedDevice::choleskySolve(const double* factor, int64_t n, double* b, int64_t m) {
  enqueue("choleskySolve", &Device::choleskySolve, array(factor, n * n), n, array(b, n * m), m);
}

void GuardedDevice::choleskyInverse(double* a, int64_t n) {
  enqueue("choleskyInverse", &Device::choleskyInverse, array(a, n * n), n);
}

void GuardedDevice::mirrorLower(double* a, int64_t n) {
  enqueue("mirrorLower", &Device::mirrorLower, array(a, n * n), n);
}

void GuardedDevice::scale(const Matrix& x, double factor) {
  enqueue("scale", &Device::scale, x, factor);
}

void GuardedDevice::blend(double* a, double alpha, const double* b, double beta, int64_t count) {
  enqueue("blend", &Device::blend, array(a, count), alpha, array(b, count), beta, count);
}

void GuardedDevice::addToDiagonal(double* a, int64_t n, double value) {
  enqueue("addToDiagonal", &Device::addToDiagonal, array(a, n * n), n, value);
}

void GuardedDevice::scaledTranspose(const float* x, int64_t rows, int64_t cols, const double* scale, double* y) {
  enqueue("scaledTranspose", &Device::scaledTranspose, array(x, rows * cols), rows, cols, array(scale, rows),
          array(y, cols * rows));
}

int64_t GuardedDevice::countNonFinite(const Matrix& x) {
  return device_->countNonFinite(outsideOfRecording("countNonFinite")(x).value);
}

void GuardedDevice::symmetricProduct(const double* a, int64_t n, int64_t m, double alpha, double beta, double* c) {
  enqueue("symmetricProduct", &Device::symmetricProduct, array(a, n * m), n, m, alpha, beta, array(c, n * n));
}

void GuardedDevice::lowestEigenpairs(double* a, int64_t n, int64_t count, double* values, double* vectors) {
  enqueue("lowestEigenpairs", &Device::lowestEigenpairs, array(a, n * n), n, count, array(values, count),
          array(vectors, count * n));
}

}  // namespace lora_da::test
