// Matrix products and tile loads of a warp, asynchronous copies (the host's cuda/tensor_core.h).
#include <cstring>
#include <numeric>
#include <vector>

#include "simt.h"
#include "simulator.h"

namespace cuda_sim {

namespace {

[[gnu::no_sanitize("address", "undefined")]] inline float fromBfloat16(uint32_t bits16) {
  const uint32_t wide = bits16 << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
[[gnu::no_sanitize("address", "undefined")]] inline float low(uint32_t pair) {
  return fromBfloat16(pair & 0xFFFFu);
}
[[gnu::no_sanitize("address", "undefined")]] inline float high(uint32_t pair) {
  return fromBfloat16(pair >> 16);
}

struct ProductLane {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// A product of two bf16 values is exact in float. The sixteen products of an element are added to it in float, k ascending.
// Instrumented, it would take most of a test's time; its indices follow from the loops alone.
[[gnu::no_sanitize("address", "undefined")]] void finishProduct(unsigned, void* const* lanes) {
  float a[16][16];
  float b[16][8];
  float d[16][8];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<ProductLane*>(lanes[lane]);
    const unsigned g = lane / 4;
    const unsigned t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = g + i % 2 * 8;
      const unsigned column = 2 * t + i / 2 * 8;
      a[row][column] = low(mine.a[i]);
      a[row][column + 1] = high(mine.a[i]);
    }
    for (unsigned i = 0; i < 2; ++i) {
      b[2 * t + i * 8][g] = low(mine.b[i]);
      b[2 * t + i * 8 + 1][g] = high(mine.b[i]);
    }
    for (unsigned i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = mine.d[i];
  }
  for (unsigned row = 0; row < 16; ++row) {
    for (unsigned k = 0; k < 16; ++k) {
      for (unsigned column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<ProductLane*>(lanes[lane]);
    for (unsigned i = 0; i < 4; ++i) mine.d[i] = d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  }
}

struct TileLane {
  uint32_t* r;
  const void* row;
};

void finishTiles(void* const* lanes, bool transposed) {
  for (unsigned tile = 0; tile < 4; ++tile) {
    uint16_t elements[8][8];
    for (unsigned row = 0; row < 8; ++row) {
      std::memcpy(elements[row], static_cast<TileLane*>(lanes[tile * 8 + row])->row, sizeof elements[row]);
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      const unsigned line = lane / 4;
      const unsigned first = 2 * (lane % 4);
      const uint32_t one = transposed ? elements[first][line] : elements[line][first];
      const uint32_t two = transposed ? elements[first + 1][line] : elements[line][first + 1];
      static_cast<TileLane*>(lanes[lane])->r[tile] = one | two << 16;
    }
  }
}

[[noreturn]] void failAt(cudaError_t error, const char* operation, const char* file, int line, const char* what) {
  failThread(error, currentThreadName() + ": " + operation + " (" + file + ":" + std::to_string(line) + ") " + what);
}

void requireShared(const void* address, const char* operation, const char* file, int line) {
  if (!inSharedMemory(address, 16)) {
    failAt(cudaErrorIllegalAddress, operation, file, line, "with an address that is not in shared memory");
  }
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    failAt(cudaErrorMisalignedAddress, operation, file, line, "with an address not aligned to 16 bytes");
  }
}

constexpr size_t copyBytes = 16;

struct Copy {
  unsigned char* shared;
  const unsigned char* global;  // null: zeros
};

// One thread's copies that have not landed, oldest first.
struct Copies {
  std::vector<Copy> all;
  std::vector<size_t> groups;  // how many copies each closed group has; the rest are in the open one
  size_t grouped = 0;
};

Copies& copiesOf(unsigned thread) {
  static auto& all = *new std::vector<Copies>(1024);
  return all[thread];
}

void land(const Copy& copy) {
  if (copy.global) {
    std::memcpy(copy.shared, copy.global, copyBytes);
  } else {
    std::memset(copy.shared, 0, copyBytes);
  }
}

}  // namespace

void warpProduct(float* d, const uint32_t* a, const uint32_t* b, const char* file, int line) {
  ProductLane mine{d, a, b};
  warpTogether(0xFFFFFFFFu, "mma16816", &mine, finishProduct, file, line);
}

void warpLoadTiles(uint32_t* r, const void* row, bool transposed, const char* file, int line) {
  const char* operation = transposed ? "loadTilesTransposed" : "loadTiles";
  requireShared(row, operation, file, line);
  TileLane mine{r, row};
  const WarpFinish finish = transposed ? WarpFinish([](unsigned, void* const* lanes) { finishTiles(lanes, true); })
                                       : WarpFinish([](unsigned, void* const* lanes) { finishTiles(lanes, false); });
  warpTogether(0xFFFFFFFFu, operation, &mine, finish, file, line);
}

// What the destination holds until the wait is unknown: 0xFF bytes here. The source is read at the wait too.
void startCopy(void* shared, const void* global, bool inside, const char* file, int line) {
  requireShared(shared, "copyAsync16", file, line);
  if (inside && reinterpret_cast<uintptr_t>(global) % copyBytes != 0) {
    failAt(cudaErrorMisalignedAddress, "copyAsync16", file, line, "from an address not aligned to 16 bytes");
  }
  if (inside && !readableByKernels(global, copyBytes)) {
    failAt(cudaErrorIllegalAddress, "copyAsync16", file, line, "from what is not, or not wholly, device memory");
  }
  std::memset(shared, 0xFF, copyBytes);
  copiesOf(currentThread())
      .all.push_back({static_cast<unsigned char*>(shared), inside ? static_cast<const unsigned char*>(global) : nullptr});
}

void closeCopyGroup() {
  Copies& copies = copiesOf(currentThread());
  copies.groups.push_back(copies.all.size() - copies.grouped);
  copies.grouped = copies.all.size();
}

void landCopies(int pending) {
  Copies& copies = copiesOf(currentThread());
  if (copies.groups.size() <= static_cast<size_t>(pending)) return;
  const auto firstKept = copies.groups.end() - pending;
  const size_t count = std::accumulate(copies.groups.begin(), firstKept, size_t{0});
  for (size_t i = 0; i < count; ++i) land(copies.all[i]);
  copies.all.erase(copies.all.begin(), copies.all.begin() + static_cast<std::ptrdiff_t>(count));
  copies.groups.erase(copies.groups.begin(), firstKept);
  copies.grouped -= count;
}

bool copiesUnderWay(unsigned thread) {
  return !copiesOf(thread).all.empty();
}

void dropCopies(unsigned thread) {
  Copies& copies = copiesOf(thread);
  copies.all.clear();
  copies.groups.clear();
  copies.grouped = 0;
}

}  // namespace cuda_sim
