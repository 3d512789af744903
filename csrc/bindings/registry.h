#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "bindings/bridge.h"

namespace sluice::bindings {

class SessionState;

// The sessions of this process by id: the one object of `_core` that lives as long as the process.
// It is never destroyed, and its lock is held across fork, so that a child can look up what it
// inherited. A call copies the pointer: closing or dropping a session while one runs is safe.

/// Gives the session its handle, 1 and upwards, never given twice.
[[nodiscard]] std::int64_t add_session(std::shared_ptr<SessionState> session);
/// Null when it was closed or never was.
[[nodiscard]] std::shared_ptr<SessionState> find_session(std::int64_t handle);
void remove_session(std::int64_t handle);
/// Opens a removed handle again.
void restore_session(std::int64_t handle, std::shared_ptr<SessionState> session);
/// Closes every session that this process opened. Without the GIL: running calls may need it.
void close_all_sessions();

/// What the bridge calls: 0, or 1 with the error kept for `take_error`.
[[nodiscard]] std::int32_t forward_by_handle(const SluiceForwardCall& call) noexcept;
/// The calling thread's last error of that session; SluiceError for a handle that is not open.
[[nodiscard]] std::exception_ptr take_error(std::int64_t handle);

}  // namespace sluice::bindings
