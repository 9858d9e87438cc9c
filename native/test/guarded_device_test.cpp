// That the guarded device refuses what a device with memory of its own would fail at.
#include "guarded_device.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <string>

#include "core/error.h"
#include "test_device.h"

using namespace lora_da;
using namespace lora_da::test;

namespace {

std::unique_ptr<GuardedDevice> guarded() {
  return std::make_unique<GuardedDevice>(cpuDevice(DType::f32));
}

Matrix row(void* data, int64_t cols) {
  return {data, DType::f32, 1, cols, cols};
}

template <class Body>
std::string errorOf(Body body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("the host cannot read a guarded device's memory" * cpuOnly("of the guarded device alone")) {
  const auto device = guarded();
  const Buffer buffer = device->allocate(64, "test");
  device->zero(buffer.get(), 64);
  const pid_t child = fork();
  if (child == 0) {
    std::signal(SIGSEGV, SIG_DFL);
    _exit(*static_cast<volatile char*>(buffer.get()));
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFSIGNALED(status));
}

TEST_CASE("operands outside of a guarded device's live memory are refused" * cpuOnly("of the guarded device alone")) {
  const auto device = guarded();
  const Buffer x = device->allocate(64, "test"), y = device->allocate(64, "test");
  device->zero(x.get(), 64);
  CHECK_NOTHROW(device->convert(row(x.get(), 16), row(y.get(), 16)));
  float host[16];
  CHECK(errorOf([&] { device->convert(row(host, 16), row(y.get(), 16)); }) ==
        "convert: memory of the host where memory of the device is expected");
  CHECK(errorOf([&] { device->convert(row(x.get(), 17), row(y.get(), 17)); }) ==
        "convert: an operand that does not lie inside of an allocation");
  void* freed = device->allocate(64, "test").get();
  CHECK(errorOf([&] { device->convert(row(freed, 16), row(y.get(), 16)); }) ==
        "convert: an operand that does not lie inside of an allocation");
}

TEST_CASE("a guarded device's download arrives when it is synchronized" * cpuOnly("of the guarded device alone")) {
  const auto device = guarded();
  const Buffer x = device->allocate(sizeof(float), "test");
  float value = 3, found = 0;
  device->upload(x.get(), &value, sizeof value);
  device->download(&found, x.get(), sizeof found);
  device->zero(x.get(), sizeof value);
  CHECK(std::isnan(found));
  device->synchronize();
  CHECK(found == 3);
}

TEST_CASE("a guarded device records work once, with the values of that time" * cpuOnly("of the guarded device alone")) {
  const auto device = guarded();
  TestMatrix a(*device, DType::f32, 2, 2), b(*device, DType::f32, 2, 2), c(*device, DType::f32, 2, 2);
  for (int64_t i = 0; i < 4; ++i) a.set(i, 1), b.set(i, 1);
  int calls = 0;
  const auto run = [&](float alpha) {
    const Matrix left = a.view(), right = b.view(), result = c.view();
    device->recorded([&] {
      ++calls;
      device->matmul(Transpose::no, left, Transpose::no, right, alpha, false, result);
    });
    return c.at(1, 1);
  };
  CHECK(run(1) == 2);
  CHECK(calls == 2);
  a.set(2, 5);
  CHECK(run(1) == 6);
  CHECK(calls == 3);
  CHECK(device->recordings() == 1);
  CHECK(run(0.5f) == 3);
  CHECK(device->recordings() == 2);
}

TEST_CASE("what a recorded body must not do is refused" * cpuOnly("of the guarded device alone")) {
  const auto device = guarded();
  const Buffer x = device->allocate(64, "test");
  float host[16] = {};
  const auto inside = [&](const std::function<void()>& body) { return errorOf([&] { device->recorded(body); }); };
  CHECK(inside([&] { device->upload(x.get(), host, 64); }) == "upload inside of recorded()");
  CHECK(inside([&] { device->download(host, x.get(), 64); }) == "download inside of recorded()");
  CHECK(inside([&] { device->synchronize(); }) == "synchronize inside of recorded()");
  CHECK(inside([&] { device->allocate(64, "test"); }) == "allocate inside of recorded()");
  int calls = 0;
  CHECK(inside([&] { device->zero(x.get(), ++calls == 1 ? 32 : 64); }) == "recorded work that is not the same each time");
  CHECK_NOTHROW(device->zero(x.get(), 64));
}
