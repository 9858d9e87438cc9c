// The table of one instruction set.
#include "cpu/kernels/kernels.h"

namespace lora_da::cpu::KERNEL_ISA {

void fillElementwise(Kernels& table);
void fillAttention(Kernels& table);
void fillPanels(Kernels& table);
void fillProducts(Kernels& table);
void fillMoments(Kernels& table);
void fillSoftmax(Kernels& table);

void fillKernels(Kernels& table) {
  fillElementwise(table);
  fillAttention(table);
  fillPanels(table);
  fillProducts(table);
  fillMoments(table);
  fillSoftmax(table);
}

}  // namespace lora_da::cpu::KERNEL_ISA
