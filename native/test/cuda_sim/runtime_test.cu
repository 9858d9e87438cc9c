// Streams, events, copies, graphs and memory.
#include <cmath>
#include <stdexcept>

#include "cuda/launch.h"
#include "sim_test.h"

using namespace lora_da::cuda;

namespace {

using namespace cuda_sim;

__global__ void fill(float* x, float value) {
  x[threadIdx.x] = value;
}
__global__ void scale(const float* x, float* y, float by) {
  y[threadIdx.x] = x[threadIdx.x] * by;
}

constexpr int count = 32;
constexpr size_t bytes = count * sizeof(float);

cudaError_t enqueueFill(const DeviceArray<float>& x, float value, cudaStream_t stream) {
  return launchKernel(fill, 1, count, 0, stream, x.data, value);
}
cudaError_t enqueueScale(const DeviceArray<float>& x, const DeviceArray<float>& y, float by, cudaStream_t stream) {
  return launchKernel(scale, 1, count, 0, stream, x.data, y.data, by);
}

struct Event {
  cudaEvent_t handle = nullptr;
  explicit Event(unsigned flags = cudaEventDisableTiming) { REQUIRE(cudaEventCreateWithFlags(&handle, flags) == cudaSuccess); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(handle); }
  operator cudaEvent_t() const { return handle; }
};

struct Pinned {
  float* data = nullptr;
  Pinned() { REQUIRE(cudaMallocHost(&data, bytes) == cudaSuccess); }
  explicit Pinned(float value) : Pinned() { std::fill(data, data + count, value); }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  ~Pinned() { cudaFreeHost(data); }
};

std::vector<float> read(const DeviceArray<float>& x, cudaStream_t stream) {
  std::vector<float> host(count);
  CHECK(cudaMemcpyAsync(host.data(), x.data, bytes, cudaMemcpyDeviceToHost, stream) == cudaSuccess);
  return host;
}

struct Environment {
  const char* name;
  Environment(const char* variable, const std::string& value) : name(variable) {
    setenv(name, value.c_str(), 1);
    resetForTest();
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;
  ~Environment() {
    unsetenv(name);
    resetForTest();
  }
};

}  // namespace

TEST_CASE("nothing runs before the host waits") {
  const Fresh fresh;
  const DeviceArray<float> x(count);
  const Stream stream;
  bool ran = false;
  CHECK(enqueue(stream, "work", [&] { ran = true; }) == cudaSuccess);
  CHECK(enqueueFill(x, 1, stream) == cudaSuccess);
  CHECK(!ran);
  CHECK(queuedOperations() == 2);
  CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
  CHECK(ran);
  CHECK(queuedOperations() == 0);
}

TEST_CASE("a host function runs in its place in the stream") {
  const Fresh fresh;
  const Stream stream;
  std::vector<int> order;
  enqueue(stream, "first", [&] { order.push_back(1); });
  const auto second = [](void* data) { static_cast<std::vector<int>*>(data)->push_back(2); };
  CHECK(cudaLaunchHostFunc(stream, second, &order) == cudaSuccess);
  CHECK(order.empty());
  cudaStreamSynchronize(stream);
  CHECK(order == std::vector<int>{1, 2});
}

TEST_CASE("a stream that waits for an event gets what was written before it") {
  const Fresh fresh;
  const DeviceArray<float> x(count), y(count);
  const Stream producer, consumer;
  const Event written;
  enqueueFill(x, 3, producer);
  CHECK(cudaEventRecord(written, producer) == cudaSuccess);
  CHECK(cudaStreamWaitEvent(consumer, written, 0) == cudaSuccess);
  enqueueScale(x, y, 2, consumer);
  CHECK(read(y, consumer)[5] == 6);
}

TEST_CASE("a result used before its event is not there") {
  const Fresh fresh;
  CHECK(wrongWithEverySeed([] {
    const DeviceArray<float> x(count), y(count);
    const Stream producer, consumer;
    enqueueFill(x, 3, producer);
    enqueueScale(x, y, 2, consumer);
    const bool right = read(y, consumer)[5] == 6;
    cudaDeviceSynchronize();
    return right;
  }));
}

TEST_CASE("with random interleaving, work that should wait comes too early with some seeds") {
  const Fresh fresh;
  int overwritten = 0;
  for (uint64_t each = 1; each <= 40; ++each) {
    resetForTest();
    setSeed(each);
    setInterleaving(Interleaving::random);
    const DeviceArray<float> x(std::vector<float>(count, 3)), y(count);
    const Stream reader, writer;
    enqueueScale(x, y, 2, reader);
    enqueueFill(x, 100, writer);
    overwritten += read(y, reader)[5] != 6;
    cudaDeviceSynchronize();
  }
  CHECK(overwritten > 5);
  CHECK(overwritten < 35);
}

TEST_CASE("a pinned buffer reused before its copy ran gives the wrong data, a pageable one does not") {
  const Fresh fresh;
  const DeviceArray<float> x(count), y(count);
  const Stream stream;
  const Pinned pinned(1);
  std::vector<float> pageable(count, 1);
  CHECK(cudaMemcpyAsync(x.data, pinned.data, bytes, cudaMemcpyHostToDevice, stream) == cudaSuccess);
  CHECK(cudaMemcpyAsync(y.data, pageable.data(), bytes, cudaMemcpyHostToDevice, stream) == cudaSuccess);
  std::fill(pinned.data, pinned.data + count, 2.0f);
  std::fill(pageable.begin(), pageable.end(), 2.0f);
  CHECK(read(x, stream)[0] == 2);
  CHECK(read(y, stream)[0] == 1);
}

TEST_CASE("a pinned buffer reused after an event holds what was copied") {
  const Fresh fresh;
  const DeviceArray<float> x(count);
  const Stream stream;
  const Event sent;
  const Pinned pinned(1);
  cudaMemcpyAsync(x.data, pinned.data, bytes, cudaMemcpyHostToDevice, stream);
  CHECK(cudaEventRecord(sent, stream) == cudaSuccess);
  CHECK(cudaEventSynchronize(sent) == cudaSuccess);
  std::fill(pinned.data, pinned.data + count, 2.0f);
  CHECK(read(x, stream)[0] == 1);
}

TEST_CASE("pinned memory gets a copy from the device only when the host waited") {
  const Fresh fresh;
  const DeviceArray<float> x(std::vector<float>(count, 4));
  const Stream stream;
  const Pinned pinned;
  CHECK(cudaMemcpyAsync(pinned.data, x.data, bytes, cudaMemcpyDefault, stream) == cudaSuccess);
  CHECK(std::isnan(pinned.data[0]));
  CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
  CHECK(pinned.data[0] == 4);
}

TEST_CASE("registered memory is pinned until it is given back") {
  const Fresh fresh;
  const DeviceArray<float> x(count);
  const Stream stream;
  std::vector<float> host(count, 1);
  CHECK(cudaHostRegister(host.data(), bytes, cudaHostRegisterDefault) == cudaSuccess);
  CHECK(cudaHostRegister(host.data() + 1, sizeof(float), 0) == cudaErrorHostMemoryAlreadyRegistered);
  cudaMemcpyAsync(x.data, host.data(), bytes, cudaMemcpyHostToDevice, stream);
  host[0] = 2;
  CHECK(read(x, stream)[0] == 2);
  CHECK(cudaHostUnregister(host.data()) == cudaSuccess);
  CHECK(cudaHostUnregister(host.data()) == cudaErrorHostMemoryNotRegistered);
}

TEST_CASE("memory freed while queued work uses it is reported with the work's name") {
  const Fresh fresh;
  float* x = nullptr;
  REQUIRE(cudaMalloc(&x, bytes) == cudaSuccess);
  launchKernel(fill, 1, count, 0, nullptr, x, 1.0f);
  cudaFree(x);
  checkReported(cudaErrorIllegalAddress, "freed while queued work still uses it: (anonymous namespace)::fill");
}

TEST_CASE("pinned memory freed while a copy uses it is reported") {
  const Fresh fresh;
  const DeviceArray<float> x(count);
  const Stream stream;
  float* pinned = nullptr;
  REQUIRE(cudaMallocHost(&pinned, bytes) == cudaSuccess);
  cudaMemcpyAsync(x.data, pinned, bytes, cudaMemcpyHostToDevice, stream);
  cudaFreeHost(pinned);
  checkReported(cudaErrorIllegalAddress, "pinned host memory");
}

TEST_CASE("the legacy stream waits for blocking streams and they for it, others do not") {
  const Fresh fresh;
  const DeviceArray<float> x(count), y(count);
  cudaStream_t blocking = nullptr;
  REQUIRE(cudaStreamCreate(&blocking) == cudaSuccess);
  const Stream independent;
  enqueueFill(x, 1, blocking);
  enqueueScale(x, x, 2, nullptr);
  enqueueScale(x, x, 5, blocking);
  enqueueFill(y, 1, independent);
  CHECK(cudaStreamSynchronize(nullptr) == cudaSuccess);
  CHECK(queuedOperations() == 1);
  CHECK(read(x, blocking)[0] == 10);
  CHECK(read(y, independent)[0] == 1);
  CHECK(cudaStreamDestroy(blocking) == cudaSuccess);
}

TEST_CASE("a destroyed stream's work is still done") {
  const Fresh fresh;
  const DeviceArray<float> x(count);
  {
    const Stream stream;
    enqueueFill(x, 1, stream);
  }
  CHECK(queuedOperations() == 1);
  CHECK(x.host()[0] == 1);
}

TEST_CASE("asking again and again brings work to its end") {
  const Fresh fresh;
  const DeviceArray<float> x(count);
  const Stream stream;
  const Event done;
  for (int i = 0; i < 3; ++i) enqueueFill(x, 1, stream);
  CHECK(cudaStreamQuery(stream) == cudaErrorNotReady);
  int asked = 1;
  while (cudaStreamQuery(stream) == cudaErrorNotReady) ++asked;
  CHECK(asked > 2);
  CHECK(asked < 10);
  enqueueFill(x, 1, stream);
  cudaEventRecord(done, stream);
  CHECK(cudaEventQuery(done) == cudaErrorNotReady);
  asked = 0;
  while (cudaEventQuery(done) == cudaErrorNotReady) ++asked;
  CHECK(asked < 10);
  CHECK(cudaGetLastError() == cudaSuccess);
}

TEST_CASE("events measure time once both are done") {
  const Fresh fresh;
  const DeviceArray<float> x(count);
  const Event start(cudaEventDefault), end(cudaEventDefault), untimed;
  float milliseconds = -1;
  CHECK(cudaEventElapsedTime(&milliseconds, start, end) == cudaErrorInvalidResourceHandle);
  cudaEventRecord(start, nullptr);
  enqueueFill(x, 1, nullptr);
  cudaEventRecord(end, nullptr);
  cudaEventRecord(untimed, nullptr);
  CHECK(cudaEventElapsedTime(&milliseconds, start, end) == cudaErrorNotReady);
  CHECK(cudaEventSynchronize(end) == cudaSuccess);
  CHECK(cudaEventElapsedTime(&milliseconds, start, end) == cudaSuccess);
  CHECK(milliseconds >= 0);
  CHECK(cudaEventElapsedTime(&milliseconds, start, untimed) == cudaErrorInvalidResourceHandle);
}

TEST_CASE("rows are copied with the pitch of each side") {
  const Fresh fresh;
  std::vector<float> host(6 * 4);
  for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<float>(i);
  const DeviceArray<float> x(std::vector<float>(3 * 8, -1.0f));
  const Stream stream;
  CHECK(cudaMemcpy2DAsync(x.data, 8 * 4, host.data() + 4, 8 * 4, 3 * 4, 2, cudaMemcpyHostToDevice, stream) == cudaSuccess);
  cudaStreamSynchronize(stream);
  const auto got = x.host();
  CHECK(got[0] == 4);
  CHECK(got[2] == 6);
  CHECK(got[3] == -1);
  CHECK(got[8] == 12);
  CHECK(cudaMemcpy2DAsync(x.data, 8, host.data(), 8, 12, 2, cudaMemcpyHostToDevice, stream) == cudaErrorInvalidPitchValue);
  CHECK(cudaMemcpy2DAsync(x.data, 8 * 4, host.data(), 8 * 4, 3 * 4, 4, cudaMemcpyHostToDevice, stream) == cudaErrorInvalidValue);
}

TEST_CASE("copies that do not fit or go the wrong way are refused") {
  const Fresh fresh;
  const DeviceArray<float> x(count);
  std::vector<float> host(count * 2);
  CHECK(cudaMemcpy(x.data, host.data(), bytes + 1, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
  CHECK(cudaMemcpy(host.data(), x.data, bytes, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
  CHECK(cudaMemset(host.data(), 0, bytes) == cudaErrorInvalidValue);
  CHECK(cudaGetLastError() == cudaErrorInvalidValue);
  CHECK(cudaGetLastError() == cudaSuccess);
}

TEST_CASE("isDevice knows the bounds of device memory") {
  const Fresh fresh;
  const DeviceArray<float> x(count);
  const Pinned pinned;
  CHECK(isDevice(x.data, bytes));
  CHECK(isDevice(x.data + 1, bytes - 4));
  CHECK(!isDevice(x.data + 1, bytes));
  CHECK(!isDevice(pinned.data, bytes));
  CHECK(isPinned(pinned.data, bytes));
  CHECK(!isDevice(&fresh, 1));
}

TEST_CASE("a graph runs what was captured, as often as it is launched, with what pinned memory holds then") {
  const Fresh fresh;
  const DeviceArray<float> x(count), y(count);
  const Stream stream;
  const Pinned pinned(1);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  CHECK(cudaMemcpyAsync(x.data, pinned.data, bytes, cudaMemcpyHostToDevice, stream) == cudaSuccess);
  CHECK(enqueueScale(x, y, 10, stream) == cudaSuccess);
  cudaStreamCaptureStatus status;
  CHECK(cudaStreamIsCapturing(stream, &status) == cudaSuccess);
  CHECK(status == cudaStreamCaptureStatusActive);
  REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  CHECK(queuedOperations() == 0);
  size_t nodes = 0;
  CHECK(cudaGraphGetNodes(graph, nullptr, &nodes) == cudaSuccess);
  CHECK(nodes == 2);
  REQUIRE(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess);
  CHECK(cudaGraphDestroy(graph) == cudaSuccess);
  for (float value : {2.0f, 3.0f}) {
    std::fill(pinned.data, pinned.data + count, value);
    CHECK(cudaGraphLaunch(executable, stream) == cudaSuccess);
    CHECK(read(y, stream)[7] == 10 * value);
  }
  CHECK(cudaGraphExecDestroy(executable) == cudaSuccess);
}

TEST_CASE("a capture spreads over streams through events, and must be joined") {
  const Fresh fresh;
  const DeviceArray<float> x(count), y(count), z(count);
  const Stream stream, side;
  const Event fork, join;
  for (bool joined : {true, false}) {
    CAPTURE(joined);
    cudaGraph_t graph = nullptr;
    REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
    enqueueFill(x, 2, stream);
    cudaEventRecord(fork, stream);
    CHECK(cudaStreamWaitEvent(side, fork, 0) == cudaSuccess);
    enqueueScale(x, y, 3, side);
    cudaEventRecord(join, side);
    enqueueScale(x, z, 5, stream);
    if (joined) CHECK(cudaStreamWaitEvent(stream, join, 0) == cudaSuccess);
    enqueueScale(joined ? y : x, joined ? y : x, 1, stream);
    CHECK(cudaStreamEndCapture(stream, &graph) == (joined ? cudaSuccess : cudaErrorStreamCaptureUnjoined));
    if (!joined) continue;
    cudaGraphExec_t executable = nullptr;
    REQUIRE(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess);
    cudaGraphLaunch(executable, stream);
    CHECK(read(y, stream)[0] == 6);
    CHECK(read(z, stream)[0] == 10);
  }
}

TEST_CASE("what a capture cannot hold is refused and ends it") {
  const Fresh fresh;
  const DeviceArray<float> x(count);
  const Stream stream, other;
  const Event outside;
  std::vector<float> host(count);
  float* memory = nullptr;
  cudaEventRecord(outside, other);
  const std::vector<std::pair<cudaError_t, std::function<cudaError_t()>>> calls = {
      {cudaErrorStreamCaptureUnsupported, [&] { return cudaMalloc(&memory, 4); }},
      {cudaErrorStreamCaptureUnsupported, [&] { return cudaStreamSynchronize(stream); }},
      {cudaErrorStreamCaptureUnsupported, [&] { return cudaDeviceSynchronize(); }},
      {cudaErrorStreamCaptureUnsupported, [&] { return cudaStreamQuery(stream); }},
      {cudaErrorStreamCaptureUnsupported,
       [&] { return cudaMemcpyAsync(x.data, host.data(), bytes, cudaMemcpyHostToDevice, stream); }},
      {cudaErrorStreamCaptureUnsupported,
       [&] { return cudaMemcpyAsync(host.data(), x.data, bytes, cudaMemcpyDeviceToHost, stream); }},
      {cudaErrorStreamCaptureIsolation, [&] { return cudaStreamWaitEvent(stream, outside, 0); }},
  };
  for (size_t i = 0; i < calls.size(); ++i) {
    CAPTURE(i);
    cudaGraph_t graph = nullptr;
    REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
    CHECK(calls[i].second() == calls[i].first);
    CHECK(enqueueFill(x, 1, stream) == cudaErrorStreamCaptureInvalidated);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);
    CHECK(graph == nullptr);
  }
  CHECK(enqueueFill(x, 1, stream) == cudaSuccess);
  CHECK(read(x, stream)[0] == 1);
}

TEST_CASE("a graph that uses freed memory is reported") {
  const Fresh fresh;
  const Stream stream;
  float* x = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  REQUIRE(cudaMalloc(&x, bytes) == cudaSuccess);
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  launchKernel(fill, 1, count, 0, stream, x, 1.0f);
  REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  REQUIRE(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess);
  CHECK(cudaFree(x) == cudaSuccess);
  CHECK(cudaGraphLaunch(executable, stream) == cudaSuccess);
  CHECK(cudaStreamSynchronize(stream) == cudaErrorIllegalAddress);
  checkReported(cudaErrorIllegalAddress, "is not memory of its device");
}

TEST_CASE("work that throws is reported") {
  const Fresh fresh;
  const Stream stream;
  enqueue(stream, "library call", [] { throw std::runtime_error("bad leading dimension"); });
  CHECK(cudaStreamSynchronize(stream) == cudaErrorLaunchFailure);
  checkReported(cudaErrorLaunchFailure, "library call: bad leading dimension");
}

TEST_CASE("device memory runs out where the environment says") {
  const Environment memory("CUDA_SIM_MEMORY", "1000");
  size_t free = 0, total = 0;
  float *x = nullptr, *y = nullptr;
  CHECK(cudaMalloc(&x, 600) == cudaSuccess);
  CHECK(cudaMalloc(&y, 600) == cudaErrorMemoryAllocation);
  CHECK(y == nullptr);
  CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
  CHECK(cudaMemGetInfo(&free, &total) == cudaSuccess);
  CHECK(free == 400);
  CHECK(total == 1000);
  CHECK(cudaFree(x) == cudaSuccess);
  CHECK(cudaFree(x) == cudaErrorInvalidValue);
  CHECK(allocatedBytes() == 0);
  CHECK(cudaMalloc(&y, 600) == cudaSuccess);
}

TEST_CASE("a driver that is too old is what every call says") {
  const Environment driver("CUDA_SIM_DRIVER_ERROR", "35");
  int devices = 7;
  void* x = nullptr;
  CHECK(cudaGetDeviceCount(&devices) == cudaErrorInsufficientDriver);
  CHECK(devices == 0);
  CHECK(cudaMalloc(&x, 4) == cudaErrorInsufficientDriver);
}

TEST_CASE("no device at all") {
  const Environment none("CUDA_SIM_DEVICES", "0");
  int devices = 7;
  CHECK(cudaGetDeviceCount(&devices) == cudaErrorNoDevice);
  CHECK(devices == 0);
}

TEST_CASE("memory of another device is not the kernel's") {
  const Environment two("CUDA_SIM_DEVICES", "2");
  int devices = 0;
  CHECK(cudaGetDeviceCount(&devices) == cudaSuccess);
  CHECK(devices == 2);
  const DeviceArray<float> x(count);
  CHECK(cudaSetDevice(2) == cudaErrorInvalidDevice);
  CHECK(cudaSetDevice(1) == cudaSuccess);
  const Stream stream;
  enqueueFill(x, 1, stream);
  CHECK(cudaStreamSynchronize(stream) == cudaErrorIllegalAddress);
}
