// Chooses the kernels of the best instruction set that this processor runs. LORA_DA_ISA=baseline|avx2|avx512|avx512bf16 lowers
// the choice, for tests.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels/kernels.h"

namespace lora_da::cpu {

namespace baseline {
void fillKernels(Kernels& table);
}
#if defined(__x86_64__)
namespace avx2 {
void fillKernels(Kernels& table);
}
namespace avx512 {
void fillKernels(Kernels& table);
}
namespace avx512bf16 {
void fillKernels(Kernels& table);
}
#endif

namespace {

struct InstructionSet {
  const char* name;
  bool (*runsHere)();
  void (*fillKernels)(Kernels& table);
};

// Best first; the last runs everywhere.
constexpr InstructionSet instructionSets[] = {
#if defined(__x86_64__)
    {"avx512bf16", [] { return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16"); },
     avx512bf16::fillKernels},
    {"avx512", [] { return __builtin_cpu_supports("x86-64-v4") != 0; }, avx512::fillKernels},
    {"avx2", [] { return __builtin_cpu_supports("x86-64-v3") != 0; }, avx2::fillKernels},
#endif
    {"baseline", [] { return true; }, baseline::fillKernels},
};

// The first set to consider: the one that the variable names, or the best. An unknown name is as good as none.
const InstructionSet* firstAllowed() {
  const char* wanted = std::getenv("LORA_DA_ISA");
  for (const InstructionSet& set : instructionSets) {
    if (wanted && std::strcmp(set.name, wanted) == 0) return &set;
  }
  return instructionSets;
}

Kernels choose() {
  const InstructionSet* set = firstAllowed();
  while (!set->runsHere()) ++set;
  Kernels table{};
  table.isa = set->name;
  set->fillKernels(table);
  return table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = choose();
  return table;
}

}  // namespace lora_da::cpu
