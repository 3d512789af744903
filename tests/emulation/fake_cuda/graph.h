#pragma once

#include <memory>
#include <string>
#include <vector>

#include "tests/emulation/fake_cuda/runtime.h"

namespace fake {

/// A stream's work being recorded instead of run. One stream each: no forks.
struct Capture {
  CUstream_st* stream = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  const Thread* thread = nullptr;
  /// A call that no graph can hold was made: everything but its end is refused.
  bool invalidated = false;
  std::vector<std::unique_ptr<Work>> works;
};

/// Waiting for a capturing stream, or asking about it, ends its capture.
cudaError_t refuse_captured(Session& session, CUstream_st& stream, const std::string& what);
/// Work for handle 0 ends the captures of the blocking streams that it is ordered with.
cudaError_t refuse_implicit(Session& session, const CUstream_st& stream);

}  // namespace fake

struct CUgraph_st {
  std::vector<std::unique_ptr<fake::Work>> works;
};

struct CUgraphExec_st {
  int device = 0;
  std::vector<std::unique_ptr<fake::Work>> works;
};
