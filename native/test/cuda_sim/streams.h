// What a stream and an event are; known to streams.cpp and graphs.cpp.
#pragma once

#include "simulator.h"

struct CUstream_st {
  int device = 0;
  bool blocking = true;  // waits for the legacy stream, and it for this one
  bool legacy = false;
  bool destroyed = false;
  std::deque<cuda_sim::OperationPointer> queue;  // not yet run; destroyed streams keep theirs
  uint64_t pushed = 0;
  uint64_t needed = 0;   // while queued work runs: the last operation that must
  uint64_t queried = 0;  // the operation that cudaStreamQuery last found waiting
  std::shared_ptr<cuda_sim::Capture> capture;
  std::vector<size_t> capturedLast;  // the nodes that the next captured one waits for
};

struct CUevent_st {
  bool timing = true;
  cuda_sim::OperationPointer recorded;
  cuda_sim::OperationPointer queried;
  std::shared_ptr<cuda_sim::Capture> capture;  // when it was recorded in a capturing stream
  std::vector<size_t> captured;
};

namespace cuda_sim {

std::vector<CUstream_st*> capturingStreams();
// cudaStreamWaitEvent where the stream captures or the event was recorded in a capture.
cudaError_t waitInCapture(CUstream_st& stream, const CUevent_st& event);

}  // namespace cuda_sim
