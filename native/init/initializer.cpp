#include "init/initializer.h"

#include "core/error.h"
#include "init/lora_da.h"
#include "init/plain.h"

namespace lora_da {

const std::vector<Initializer>& initializers() {
  static const std::vector<Initializer> table = {
      {"lora-da", {true, true, true}, initializeLoraDa, loraDaWorkspaceBytes},
      {"kaiming", {}, initializeKaiming},
      {"gaussian", {}, initializeGaussian},
      {"orthogonal", {}, initializeOrthogonal},
  };
  return table;
}

const Initializer& findInitializer(const std::string& name) {
  std::string known;
  for (const Initializer& initializer : initializers()) {
    if (name == initializer.name) return initializer;
    known += (known.empty() ? "" : ", ") + std::string(initializer.name);
  }
  throw Error(code::invalidArgument, "Expected one of " + known + " for init but received " + name);
}

}  // namespace lora_da
