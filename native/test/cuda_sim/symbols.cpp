// dladdr knows exported functions only, and kernels mostly stand in anonymous namespaces: their names come from the symbol table
// in the module's file.
#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <unordered_map>
#include <vector>

namespace cuda_sim {

namespace {

using Names = std::unordered_map<uintptr_t, std::string>;  // by address within the module

std::vector<char> readFile(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return std::vector<char>(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

template <class T>
T at(const std::vector<char>& file, size_t offset) {
  T value{};
  if (offset <= file.size() && sizeof value <= file.size() - offset) std::memcpy(&value, file.data() + offset, sizeof value);
  return value;
}

Names functionsOf(const std::vector<char>& file) {
  Names names;
  const auto header = at<ElfW(Ehdr)>(file, 0);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return names;
  for (size_t i = 0; i < header.e_shnum; ++i) {
    const auto table = at<ElfW(Shdr)>(file, header.e_shoff + i * header.e_shentsize);
    if (table.sh_type != SHT_SYMTAB) continue;
    const auto strings = at<ElfW(Shdr)>(file, header.e_shoff + table.sh_link * size_t{header.e_shentsize});
    for (size_t offset = 0; offset < table.sh_size; offset += sizeof(ElfW(Sym))) {
      const auto symbol = at<ElfW(Sym)>(file, table.sh_offset + offset);
      const size_t name = strings.sh_offset + symbol.st_name;
      if ((symbol.st_info & 0xF) == STT_FUNC && symbol.st_value != 0 && name < file.size()) {
        names.emplace(symbol.st_value, file.data() + name);
      }
    }
  }
  return names;
}

const Names& functionsOfModule(const Dl_info& module) {
  static auto& known = *new std::map<const void*, Names>;
  const auto found = known.find(module.dli_fbase);
  if (found != known.end()) return found->second;
  std::vector<char> file = readFile(module.dli_fname);
  if (file.empty()) file = readFile("/proc/self/exe");  // the program's own name may be relative to another folder
  return known.emplace(module.dli_fbase, functionsOf(file)).first->second;
}

}  // namespace

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

std::string functionName(const void* function) {
  Dl_info module;
  if (dladdr(function, &module) == 0) return "kernel";
  if (module.dli_sname && module.dli_saddr == function) return demangled(module.dli_sname);
  const Names& names = functionsOfModule(module);
  const auto address = reinterpret_cast<uintptr_t>(function);
  auto found = names.find(address - reinterpret_cast<uintptr_t>(module.dli_fbase));
  if (found == names.end()) found = names.find(address);  // a program that is not position-independent
  return found == names.end() ? "kernel" : demangled(found->second);
}

}  // namespace cuda_sim
