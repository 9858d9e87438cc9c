// The scheduler of a block's threads. A thread runs until it waits for others or ends; who goes on then is drawn at random.
#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>

#include "fiber.h"
#include "simulator.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace cuda_sim {

namespace {

constexpr unsigned maximumThreads = 1024;

enum class State { ready, atBarrier, withWarp, exited };

struct Place {
  const char* operation = "";
  const char* file = "";
  int line = 0;
};

bool same(const char* a, const char* b) {
  return a == b || std::strcmp(a, b) == 0;
}
bool operator==(const Place& a, const Place& b) {
  return a.line == b.line && same(a.operation, b.operation) && same(a.file, b.file);
}

std::string text(const Place& place) {
  return std::string(place.operation) + " (" + place.file + ":" + std::to_string(place.line) + ")";
}

struct Thread {
  Fiber fiber;
  bool prepared = false;
  uint3 index{};
  unsigned linear = 0;
  State state = State::exited;
  Place place;
  int predicate = 0;  // at a barrier: in and out
};

// Lanes of one warp that wait for each other.
struct Meeting {
  unsigned mask = 0;
  unsigned arrived = 0;
  Place place;
  void* lanes[32];
};

struct Warp {
  std::vector<Meeting> meetings;
};

struct Block {
  const std::string* kernel = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Thread>> threads = std::vector<std::unique_ptr<Thread>>(maximumThreads);
  std::vector<Warp> warps = std::vector<Warp>(maximumThreads / 32);
  unsigned count = 0;
  unsigned live = 0;
  unsigned atBarrier = 0;
  Barrier barrier = Barrier::plain;
  Place barrierPlace;
  std::vector<Thread*> ready;
  // Depth first, those just released go on first, so that a warp runs far ahead; otherwise any thread may be next.
  bool depthFirst = false;
  Thread* current = nullptr;
  Fiber host;
  bool failed = false;
  unsigned char* shared = nullptr;
  size_t sharedBytes = 0;
};

Block& block() {
  static Block* const instance = new Block;
  return *instance;
}

// One generator for the choice of the next thread: the library's would cost more than the switch.
uint32_t fastState = 1;
unsigned fastBelow(size_t limit) {
  fastState ^= fastState << 13;
  fastState ^= fastState >> 17;
  fastState ^= fastState << 5;
  return static_cast<unsigned>(uint64_t{fastState} * limit >> 32);
}

void enter(Thread& thread) {
  block().current = &thread;
  threadIdx = thread.index;
}

Thread* takeReady() {
  auto& ready = block().ready;
  if (ready.empty()) return nullptr;
  if (!block().depthFirst) std::swap(ready[fastBelow(ready.size())], ready.back());
  Thread* next = ready.back();
  ready.pop_back();
  return next;
}

void makeReady(Thread& thread) {
  auto& ready = block().ready;
  thread.state = State::ready;
  ready.push_back(&thread);
}

// Orders the last `released` of the ready threads at random; without effect on the choice where that is random anyway.
void shuffleReady(size_t released) {
  auto& ready = block().ready;
  if (!block().depthFirst) return;
  const size_t first = ready.size() - released;
  for (size_t i = released; i > 1; --i) std::swap(ready[first + i - 1], ready[first + fastBelow(i)]);
}

// Lets another thread go on; returns when this one does.
void suspend() {
  Thread& self = *block().current;
  Thread* next = takeReady();
  if (next == &self) {
    enter(self);
    return;
  }
  if (next) enter(*next);
  switchFiber(self.fiber, next ? next->fiber : block().host);
}

std::string blockName() {
  return *block().kernel + ", block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

std::string stateText(const Thread& thread) {
  switch (thread.state) {
    case State::ready: return "under way";
    case State::atBarrier: return "at " + text(thread.place);
    case State::withWarp: return "at " + text(thread.place);
    case State::exited: return "exited";
  }
  return "";
}

// Each range of threads in the same state, a line each.
std::string describeThreads() {
  const Block& b = block();
  std::string lines;
  size_t ranges = 0;
  for (unsigned first = 0; first < b.count;) {
    const std::string state = stateText(*b.threads[first]);
    unsigned last = first;
    while (last + 1 < b.count && stateText(*b.threads[last + 1]) == state) ++last;
    if (++ranges > 40) return lines + "\n  ...";
    lines += "\n  thread" +
             (first == last ? " " + std::to_string(first) : "s " + std::to_string(first) + "-" + std::to_string(last)) + " " +
             state;
    first = last + 1;
  }
  return lines;
}

void releaseBarrier() {
  Block& b = block();
  int nonZero = 0;
  for (unsigned i = 0; i < b.count; ++i) nonZero += b.threads[i]->state == State::atBarrier && b.threads[i]->predicate != 0;
  int result = 0;
  switch (b.barrier) {
    case Barrier::plain: break;
    case Barrier::any: result = nonZero > 0; break;
    case Barrier::all: result = nonZero == static_cast<int>(b.atBarrier); break;
    case Barrier::count: result = nonZero; break;
  }
  for (unsigned i = 0; i < b.count; ++i) {
    Thread& thread = *b.threads[i];
    if (thread.state != State::atBarrier) continue;
    thread.predicate = result;
    makeReady(thread);
  }
  shuffleReady(b.atBarrier);
  b.atBarrier = 0;
}

// The other threads stay where they are; their stacks are started afresh for the next kernel.
void leaveKernel() {
  block().failed = true;
  switchFiber(block().current->fiber, block().host);
}

void exitThread() {
  Block& b = block();
  if (copiesUnderWay(b.current->linear)) {
    report(cudaErrorLaunchFailure,
           currentThreadName() +
               ": exited while its asynchronous copies were under way, to shared memory that another block may own");
    leaveKernel();
  }
  dropCopies(b.current->linear);
  b.current->state = State::exited;
  --b.live;
  if (b.live > 0 && b.atBarrier == b.live) releaseBarrier();
  suspend();
}

// Unwinds a thread's stack, so that nothing on it leaks.
struct ThreadFailed {};

void threadMain() {
  fiberEntered();
  for (;;) {
    bool failed = false;
    try {
      (*block().body)();
    } catch (const ThreadFailed&) {
      failed = true;
    }
    if (failed) leaveKernel();
    exitThread();
  }
}

void startBlock() {
  Block& b = block();
  b.live = b.count;
  b.atBarrier = 0;
  b.ready.clear();
  b.depthFirst = fastBelow(2) == 0;
  for (unsigned i = 0; i < b.count; ++i) makeReady(*b.threads[i]);
  shuffleReady(b.count);
  for (Warp& warp : b.warps) warp.meetings.clear();
  if (b.sharedBytes > 0) std::memset(b.shared, 0xFF, b.sharedBytes);
}

void runBlock() {
  Block& b = block();
  startBlock();
  Thread* first = takeReady();
  enter(*first);
  switchFiber(b.host, first->fiber);
  if (!b.failed && b.live > 0) {
    b.failed = true;
    report(cudaErrorLaunchFailure, blockName() + ": the threads wait for each other for ever" + describeThreads());
  }
  if (b.failed) {
    for (unsigned i = 0; i < b.count; ++i) {
      b.threads[i]->prepared = false;
      dropCopies(i);
    }
  }
}

void prepareThreads(dim3 shape) {
  Block& b = block();
  b.count = shape.x * shape.y * shape.z;
  for (unsigned i = 0; i < b.count; ++i) {
    if (!b.threads[i]) b.threads[i] = std::make_unique<Thread>();
    Thread& thread = *b.threads[i];
    thread.linear = i;
    thread.index = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    if (!thread.prepared) prepareFiber(thread.fiber, threadMain, i);
    thread.prepared = true;
  }
}

// Shared memory of exactly the launch's size, so that AddressSanitizer sees every overrun; elsewhere with a guard behind it.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t sharedGuard = 0;
#else
constexpr size_t sharedGuard = 256;
#endif
constexpr unsigned char guardByte = 0xFD;

struct FreeMemory {
  void operator()(unsigned char* memory) const { std::free(memory); }
};
using SharedMemory = std::unique_ptr<unsigned char, FreeMemory>;

SharedMemory allocateShared(size_t bytes) {
  if (bytes == 0) return nullptr;
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes + sharedGuard) != 0) std::abort();
  std::memset(static_cast<unsigned char*>(memory) + bytes, guardByte, sharedGuard);
  return SharedMemory(static_cast<unsigned char*>(memory));
}

bool sharedGuardIntact() {
  const Block& b = block();
  if (b.sharedBytes == 0) return true;
  const unsigned char* guard = b.shared + b.sharedBytes;
  return std::all_of(guard, guard + sharedGuard, [](unsigned char byte) { return byte == guardByte; });
}

}  // namespace

void runKernel(const KernelRun& run) {
  Block& b = block();
  const SharedMemory shared = allocateShared(run.sharedBytes);
  b.kernel = &run.name;
  b.body = &run.body;
  b.shared = shared.get();
  b.sharedBytes = run.sharedBytes;
  b.failed = false;
  gridDim = run.grid;
  blockDim = run.block;
  fastState = static_cast<uint32_t>(random()) | 1u;
  adoptThread(b.host);
  prepareThreads(run.block);
  std::vector<uint64_t> order(uint64_t{run.grid.x} * run.grid.y * run.grid.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  for (size_t i = 0; i < order.size() && !b.failed; ++i) {
    std::swap(order[i], order[i + fastBelow(order.size() - i)]);
    const uint64_t index = order[i];
    blockIdx = {static_cast<unsigned>(index % run.grid.x), static_cast<unsigned>(index / run.grid.x % run.grid.y),
                static_cast<unsigned>(index / run.grid.x / run.grid.y)};
    runBlock();
    if (!b.failed && !sharedGuardIntact()) {
      b.failed = true;
      report(cudaErrorIllegalAddress,
             blockName() + ": wrote past the end of its " + std::to_string(b.sharedBytes) + " bytes of shared memory");
    }
  }
  b.current = nullptr;
  b.shared = nullptr;
}

void failThread(cudaError_t error, const std::string& message) {
  report(error, message);
  throw ThreadFailed();
}

std::string currentThreadName() {
  return blockName() + ", thread (" + std::to_string(threadIdx.x) + ", " + std::to_string(threadIdx.y) + ", " +
         std::to_string(threadIdx.z) + ")";
}

unsigned currentThread() {
  return block().current->linear;
}

bool inSharedMemory(const void* address, size_t bytes) {
  const Block& b = block();
  const auto* start = static_cast<const unsigned char*>(address);
  return start >= b.shared && start + bytes <= b.shared + b.sharedBytes;
}

void* blockSharedMemory() {
  return block().shared;
}

unsigned laneIndex() {
  return block().current->linear % 32;
}

unsigned liveLanes() {
  const Block& b = block();
  const unsigned first = b.current->linear / 32 * 32;
  unsigned lanes = 0;
  for (unsigned i = first; i < std::min(first + 32, b.count); ++i) {
    if (b.threads[i]->state != State::exited) lanes |= 1u << (i - first);
  }
  return lanes;
}

int blockBarrier(Barrier kind, int predicate, const char* file, int line) {
  static const char* const names[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count"};
  Block& b = block();
  Thread& self = *b.current;
  self.state = State::atBarrier;
  self.place = {names[static_cast<int>(kind)], file, line};
  self.predicate = predicate;
  if (b.atBarrier == 0) {
    b.barrier = kind;
    b.barrierPlace = self.place;
  } else if (!(b.barrierPlace == self.place)) {
    failThread(cudaErrorLaunchFailure, blockName() + ": threads of the block wait at different barriers" + describeThreads());
  }
  ++b.atBarrier;
  if (b.atBarrier == b.live) releaseBarrier();
  suspend();
  return self.predicate;
}

void warpTogether(unsigned mask, const char* operation, void* mine, WarpFinish finish, const char* file, int line) {
  Block& b = block();
  Thread& self = *b.current;
  const unsigned lane = self.linear % 32;
  self.place = {operation, file, line};
  if (!(mask >> lane & 1u)) {
    failThread(cudaErrorLaunchFailure, currentThreadName() + ": not in the mask of its own " + text(self.place));
  }
  auto& meetings = b.warps[self.linear / 32].meetings;
  auto meeting = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) { return m.mask == mask; });
  if (meeting == meetings.end()) {
    meetings.emplace_back();
    meeting = meetings.end() - 1;
    meeting->mask = mask;
    meeting->place = self.place;
  }
  self.state = State::withWarp;
  if (!(meeting->place == self.place)) {
    failThread(cudaErrorLaunchFailure,
               blockName() + ": lanes of a warp wait for each other at different places" + describeThreads());
  }
  meeting->lanes[lane] = mine;
  meeting->arrived |= 1u << lane;
  if (meeting->arrived == mask) {
    finish(mask, meeting->lanes);
    meetings.erase(meeting);
    const unsigned first = self.linear - lane;
    unsigned released = 0;
    for (unsigned i = 0; i < 32; ++i) {
      if (!(mask >> i & 1u)) continue;
      makeReady(*b.threads[first + i]);
      ++released;
    }
    shuffleReady(released);
  }
  suspend();
}

unsigned ballot(unsigned mask, bool predicate, const char* operation, const char* file, int line) {
  VoteLane mine{predicate, 0};
  const auto finish = [](unsigned lanesMask, void* const* lanes) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (lanesMask >> lane & 1u && static_cast<VoteLane*>(lanes[lane])->predicate) votes |= 1u << lane;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (lanesMask >> lane & 1u) static_cast<VoteLane*>(lanes[lane])->ballot = votes;
    }
  };
  warpTogether(mask, operation, &mine, finish, file, line);
  return mine.ballot;
}

}  // namespace cuda_sim
