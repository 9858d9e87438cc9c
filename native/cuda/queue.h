// The stream that all work of a device goes through, in order: kernels, library calls, fills and copies. It also records: the
// work of recorded(body) is captured as a CUDA graph the first time and replayed whenever body asks for the same again.
//
// How "the same" is known: body is called once without doing anything, while every launch, with the values of its arguments,
// goes into a fingerprint. What a graph depends on is thereby what it was made of, and no caller has to list it. Scratch memory
// grows during that call, so that nothing is allocated during a capture.
#pragma once

#include <cstdint>
#include <functional>
#include <type_traits>
#include <unordered_map>

#include "cuda/errors.h"
#include "cuda/launch.h"

namespace lora_da::cuda {

class Queue {
 public:
  Queue();
  ~Queue();
  Queue(const Queue&) = delete;

  cudaStream_t stream() const { return stream_; }

  // Arguments are passed by value: pointers into device memory, numbers, and plain structs without padding bytes that differ.
  template <class... Parameters, class... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t sharedBytes,
              Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (observing()) {
      note(reinterpret_cast<const void*>(kernel), grid, block, sharedBytes);
      (note(static_cast<Parameters>(arguments)), ...);
      return;
    }
    if (sharedBytes > defaultSharedBytes) allowShared(reinterpret_cast<const void*>(kernel), sharedBytes);
    check(launchKernel(kernel, grid, block, sharedBytes, stream_, static_cast<Parameters>(arguments)...), name);
  }
  void fill(void* device, int byte, size_t bytes);
  void copy(void* to, const void* from, size_t bytes);  // device memory both

  // A call of a library that enqueues on stream(): `call()` unless this is the observing call of body; `parts` are the plain
  // values that the work depends on.
  template <class Call, class... Parts>
  void library(Call call, const Parts&... parts) {
    if (observing())
      (note(parts), ...);
    else
      call();
  }

  void recorded(const std::function<void()>& body);
  bool observing() const { return mode_ == Mode::observe; }
  void synchronize();

  // How many graphs recorded() keeps.
  size_t graphs() const { return graphs_.size(); }

 private:
  enum class Mode { run, observe, capture };
  static constexpr size_t defaultSharedBytes = 48 * 1024;
  struct Fingerprint {
    uint64_t first = 0, second = 0;
    bool operator==(const Fingerprint& other) const { return first == other.first && second == other.second; }
  };

  template <class T>
  void note(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>, "a launch's arguments are plain values");
    noteBytes(&value, sizeof value);
  }
  template <class First, class... Rest>
  void note(const First& first, const Rest&... rest) {
    note(first);
    note(rest...);
  }
  void noteBytes(const void* bytes, size_t count);
  void allowShared(const void* kernel, size_t bytes);
  Fingerprint observe(const std::function<void()>& body);
  cudaGraphExec_t capture(const std::function<void()>& body);
  struct Hash {
    size_t operator()(const Fingerprint& key) const { return static_cast<size_t>(key.first); }
  };

  cudaStream_t stream_ = nullptr;
  Mode mode_ = Mode::run;
  Fingerprint fingerprint_;
  std::unordered_map<Fingerprint, cudaGraphExec_t, Hash> graphs_;
  std::unordered_map<const void*, size_t> sharedAllowed_;
};

}  // namespace lora_da::cuda
