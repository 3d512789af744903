#pragma once

#include <stdint.h>

// What _core and _ops exchange: a table of C functions each way, so that neither links the other.
// Both check `version` and `bytes` before they use a table. Codes: 0 is success, anything else
// means that the error itself is kept in the session (`_core.take_error(handle)`).

extern "C" {

enum { kSluiceBridgeVersion = 2 };

/// One call of one MoE layer; dtypes are 0 f32, 1 bf16, 2 f16.
struct SluiceForwardCall {
  int64_t handle;  // id in _core's registry of sessions, never an address
  int64_t layer;
  int64_t num_tokens;
  int64_t top_k;
  int32_t activations;
  int32_t weights_dtype;
  const void* hidden;         // [T, H]
  const int64_t* expert_ids;  // [T, K]
  const void* weights;        // [T, K]
  void* out;                  // [T, H]
  int64_t columns;            // H of `hidden` and `out`, checked against the layer
  int32_t device;             // where the tensors lie: -1 the CPU, else the CUDA device
  uint64_t stream;            // its current stream; 0 on the CPU, and for the legacy stream
};

/// Given by _core to _ops.
struct SluiceCoreTable {
  int32_t version;
  int32_t bytes;
  /// Runs without the GIL from entry to exit.
  int32_t (*forward)(const SluiceForwardCall* call);
};

/// Given by _ops to _core: torch's GEMM and torch's intra-op pool on raw pointers.
struct SluiceTorchTable {
  int32_t version;
  int32_t bytes;
  /// c[m, n] = a[m, k] · b[n, k]^T; rows of c are ldc apart. dtype as above.
  int32_t (*gemm)(int32_t dtype, int64_t m, int64_t n, int64_t k, const void* a, const void* b,
                  void* c, int64_t ldc);
  int32_t (*num_threads)(void);
  void (*parallel_for)(int64_t count, int64_t grain, void* context,
                       void (*call)(void* context, int64_t begin, int64_t end));
  /// Why the calling thread's last `gemm` failed; valid until its next one.
  const char* (*last_error)(void);
};
}
