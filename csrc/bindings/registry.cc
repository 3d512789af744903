#include "bindings/registry.h"

#include <exception>
#include <map>
#include <string>

#include "base/error.h"
#include "base/fork_mutex.h"
#include "base/log_ring.h"
#include "bindings/session_state.h"

namespace sluice::bindings {
namespace {

struct Registry {
  ForkMutex mu;
  std::int64_t last GUARDED_BY(mu) = 0;
  std::map<std::int64_t, std::shared_ptr<SessionState>> sessions GUARDED_BY(mu);
};

/// Leaked on purpose: no session is destroyed by a static destructor, in the child of a fork least.
Registry& registry() {
  static Registry* const instance = new Registry;
  return *instance;
}

}  // namespace

std::int64_t add_session(std::shared_ptr<SessionState> session) {
  Registry& all = registry();
  const MutexLock lock(all.mu);
  const std::int64_t handle = ++all.last;
  all.sessions.emplace(handle, std::move(session));
  return handle;
}

std::shared_ptr<SessionState> find_session(std::int64_t handle) {
  Registry& all = registry();
  const MutexLock lock(all.mu);
  const auto found = all.sessions.find(handle);
  return found == all.sessions.end() ? nullptr : found->second;
}

void remove_session(std::int64_t handle) {
  Registry& all = registry();
  std::shared_ptr<SessionState> last;  // goes outside of the lock
  const MutexLock lock(all.mu);
  const auto node = all.sessions.extract(handle);
  if (!node.empty()) last = std::move(node.mapped());
}

void restore_session(std::int64_t handle, std::shared_ptr<SessionState> session) {
  Registry& all = registry();
  const MutexLock lock(all.mu);
  all.sessions.insert_or_assign(handle, std::move(session));
}

void close_all_sessions() {
  std::map<std::int64_t, std::shared_ptr<SessionState>> taken;
  {
    Registry& all = registry();
    const MutexLock lock(all.mu);
    for (auto entry = all.sessions.begin(); entry != all.sessions.end();) {
      const auto next = std::next(entry);
      if (!entry->second->is_inherited()) taken.insert(all.sessions.extract(entry));
      entry = next;
    }
  }
  for (auto& [handle, session] : taken) {
    try {
      session->close();
    } catch (const std::exception& error) {  // the others are closed all the same
      log_ring().log(LogLevel::kError, error.what());
    }
  }
}

std::int32_t forward_by_handle(const SluiceForwardCall& call) noexcept {
  const std::shared_ptr<SessionState> session = find_session(call.handle);
  return session == nullptr ? 1 : session->forward(call);
}

std::exception_ptr take_error(std::int64_t handle) {
  const std::shared_ptr<SessionState> session = find_session(handle);
  if (session != nullptr) return session->take_error();
  return std::make_exception_ptr(Error("session closed: handle " + std::to_string(handle) +
                                       " is not open; make a new session"));
}

}  // namespace sluice::bindings
