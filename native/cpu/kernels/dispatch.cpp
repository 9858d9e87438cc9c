// Chooses the kernels of the best instruction set that this processor runs. LORA_DA_ISA=baseline|avx2|avx512|avx512bf16 lowers
// the choice, for tests.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels/kernels.h"

namespace lora_da::cpu {

namespace baseline {
void fillElementwise(Kernels& table);
void fillAttention(Kernels& table);
void fillProducts(Kernels& table);
void fillMoments(Kernels& table);
}  // namespace baseline

#if defined(__x86_64__)
namespace avx2 {
void fillElementwise(Kernels& table);
void fillAttention(Kernels& table);
void fillProducts(Kernels& table);
void fillMoments(Kernels& table);
}  // namespace avx2

namespace avx512 {
void fillElementwise(Kernels& table);
void fillAttention(Kernels& table);
void fillProducts(Kernels& table);
void fillMoments(Kernels& table);
}  // namespace avx512

namespace avx512bf16 {
void fillElementwise(Kernels& table);
void fillAttention(Kernels& table);
void fillProducts(Kernels& table);
void fillMoments(Kernels& table);
}  // namespace avx512bf16
#endif

namespace {

struct InstructionSet {
  const char* name;
  bool (*runsHere)();
  void (*fillElementwise)(Kernels& table);
  void (*fillAttention)(Kernels& table);
  void (*fillProducts)(Kernels& table);
  void (*fillMoments)(Kernels& table);
};

// Best first; the last runs everywhere.
constexpr InstructionSet instructionSets[] = {
#if defined(__x86_64__)
    {"avx512bf16", [] { return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16"); },
     avx512bf16::fillElementwise, avx512bf16::fillAttention, avx512bf16::fillProducts, avx512bf16::fillMoments},
    {"avx512", [] { return __builtin_cpu_supports("x86-64-v4") != 0; }, avx512::fillElementwise, avx512::fillAttention,
     avx512::fillProducts, avx512::fillMoments},
    {"avx2", [] { return __builtin_cpu_supports("x86-64-v3") != 0; }, avx2::fillElementwise, avx2::fillAttention,
     avx2::fillProducts, avx2::fillMoments},
#endif
    {"baseline", [] { return true; }, baseline::fillElementwise, baseline::fillAttention, baseline::fillProducts,
     baseline::fillMoments},
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
  set->fillElementwise(table);
  set->fillAttention(table);
  set->fillProducts(table);
  set->fillMoments(table);
  return table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = choose();
  return table;
}

}  // namespace lora_da::cpu
