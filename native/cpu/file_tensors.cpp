// From a tensor of a checkpoint file to the compute type.
#include "core/file_tensor.h"
#include "cpu/cpu_device.h"

namespace lora_da::cpu {

void CpuDevice::convertFromFile(const HostTensor& tensor, void* target) {
  convertFileElements(tensor, 0, 0, computeType_, target);  // an unknown type throws here, outside the parallel region
  const auto rowBytes = static_cast<int64_t>(sizeOf(computeType_)) * tensor.cols;
#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int64_t row = 0; row < tensor.rows; ++row) {
    convertFileElements(tensor, row * tensor.cols, tensor.cols, computeType_, static_cast<char*>(target) + row * rowBytes);
  }
}

}  // namespace lora_da::cpu
