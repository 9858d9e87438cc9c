// Memory of the CUDA device, and the copies between it and the host.
#include <string>

#include "core/memory_text.h"
#include "cuda/cuda_device.h"
#include "cuda/uploads.h"

namespace lora_da::cuda {

Buffer CudaDevice::allocate(size_t bytes, const std::string& purpose) {
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, bytes == 0 ? 1 : bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it stays otherwise and is found again by the next launch
    throw Error(code::outOfMemory, "cannot allocate " + gigabytes(bytes) + " on " + name_ + " for " + purpose + ": " +
                                       freeMemory() +
                                       "; a smaller --batch-size or --max-length, or --recompute layer, takes less");
  }
  check(status, "allocating memory");
  return Buffer(memory, [stream = queue_.stream()](void* p) {
    cudaStreamSynchronize(stream);  // what is enqueued may still use it
    cudaFree(p);
  });
}

DeviceMemory CudaDevice::memory() const {
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for the device's memory");
  return {total - free, free};
}

void CudaDevice::upload(void* device, const void* host, size_t bytes) {
  uploads_->upload(device, host, bytes);
}

void CudaDevice::download(void* host, const void* device, size_t bytes) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, queue_.stream()), "reading memory back");
}

void CudaDevice::zero(void* device, size_t bytes) {
  queue_.fill(device, 0, bytes);
}

void CudaDevice::copy(void* to, const void* from, size_t bytes) {
  queue_.copy(to, from, bytes);
}

void CudaDevice::synchronize() {
  queue_.synchronize();
}

}  // namespace lora_da::cuda
