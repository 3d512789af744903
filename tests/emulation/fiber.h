#pragma once

#include <cstddef>

namespace simt {

// A kernel's parameters, up to 32,764 bytes, are copied onto the stack of each thread. Pages that
// nobody touches cost nothing.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr std::size_t kStackBytes = 256 << 10;
#else
inline constexpr std::size_t kStackBytes = 128 << 10;
#endif
inline constexpr std::size_t kGuardBytes = 4096;

/// One stack and the place where it stopped. Its guard page lies below `stack`.
///
/// Thread safety: none; any host thread may resume a context that another one suspended.
struct Context {
  char* stack = nullptr;
  char* top = nullptr;
  void* stopped = nullptr;
  void* fake_stack = nullptr;  // ASan's
};

/// Gives the context a stack, from a pool, on which the first `resume` calls `entry`. `entry` first
/// calls `entered`, and never returns: it suspends for ever.
void prepare(Context& context, void (*entry)());
/// Tells ASan that the switch to a new context is complete.
void entered();
/// Puts the stack back, whatever lies on it.
void release(Context& context);

/// From the host's stack: runs the context until it suspends.
void resume(Context& context);
/// From the context: back to whoever resumed it. `forever` tells ASan that nobody resumes it again.
void suspend(Context& context, bool forever);

/// In a signal handler: makes the interrupted thread go on in `landing`, on a stack of its own,
/// after the handler has returned, so that reports may allocate. False where the machine's frame
/// layout is unknown; call `landing` from the handler then. One thread at a time.
bool land_after_signal(void* signal_context, void (*landing)());

}  // namespace simt
