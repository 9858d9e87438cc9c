// From a tensor of a checkpoint file to memory.
#include "core/file_tensor.h"
#include "cpu/cpu_device.h"

namespace lora_da::cpu {

void CpuDevice::convertFromFile(const HostTensor& tensor, DType type, void* target) {
  convertFileElements(tensor, 0, 0, type, target);  // an unknown type throws here, outside the parallel region
  const auto rowBytes = static_cast<int64_t>(sizeOf(type)) * tensor.cols;
#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int64_t row = 0; row < tensor.rows; ++row) {
    convertFileElements(tensor, row * tensor.cols, tensor.cols, type, static_cast<char*>(target) + row * rowBytes);
  }
}

}  // namespace lora_da::cpu
