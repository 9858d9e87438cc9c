// What the stand-ins of cuBLAS, cuBLASLt and cuSOLVER share: they take the functions' real declarations from NVIDIA's headers,
// check their operands as the libraries do, and put the work, done by OpenBLAS or plain loops, on the call's stream.
#pragma once

#include <cublas_v2.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "cuda_sim_api.h"

namespace cuda_sim {

// A column-major operand as a library sees it.
struct Operand {
  const char* name;
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t leading;
  size_t elementBytes;

  size_t bytes() const { return rows == 0 || cols == 0 ? 0 : static_cast<size_t>((cols - 1) * leading + rows) * elementBytes; }
  bool leadingFits() const { return leading >= std::max<int64_t>(rows, 1); }
};

// What a library would read or write outside of its memory, or at an address that no load can take, is reported.
inline bool inDeviceMemory(const std::string& routine, const Operand& operand) {
  if (operand.bytes() == 0) return true;
  const bool aligned = reinterpret_cast<uintptr_t>(operand.data) % operand.elementBytes == 0;
  if (aligned && isDevice(operand.data, operand.bytes())) return true;
  report(aligned ? cudaErrorIllegalAddress : cudaErrorMisalignedAddress,
         routine + ": " + operand.name + " [" + std::to_string(operand.rows) + ", " + std::to_string(operand.cols) +
             "] with leading dimension " + std::to_string(operand.leading) +
             (aligned ? " is not within device memory" : " is not aligned to its elements"));
  return false;
}

inline bool apart(const std::string& routine, const Operand& written, const Operand& read) {
  const auto* first = static_cast<const char*>(written.data);
  const auto* second = static_cast<const char*>(read.data);
  if (first + written.bytes() <= second || second + read.bytes() <= first || written.bytes() == 0 || read.bytes() == 0)
    return true;
  report(cudaErrorIllegalAddress, routine + ": " + written.name + " is written over " + read.name);
  return false;
}

// What `written` and `read` are must lie in device memory, and the former apart from the latter.
inline bool placed(const std::string& routine, const Operand& written, const std::vector<Operand>& read) {
  if (!inDeviceMemory(routine, written)) return false;
  for (const Operand& operand : read) {
    if (!inDeviceMemory(routine, operand) || !apart(routine, written, operand)) return false;
  }
  return true;
}

// What a library leaves in its workspace is nobody's business.
inline void spoil(void* memory, size_t bytes) {
  std::fill_n(static_cast<unsigned char*>(memory), bytes, static_cast<unsigned char>(0xFF));
}

// Handles that exist.
template <class T>
class Living {
 public:
  T* make() {
    T* made = new T();
    all_.insert(made);
    return made;
  }
  bool has(const T* handle) const { return all_.count(const_cast<T*>(handle)) != 0; }
  bool end(T* handle) {
    if (all_.erase(handle) == 0) return false;
    delete handle;
    return true;
  }

 private:
  std::set<T*> all_;
};

}  // namespace cuda_sim
