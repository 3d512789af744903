#include "tests/emulation/fake_cuda/baton.h"

#include <algorithm>
#include <chrono>

namespace fake {
namespace {

// One in so many turns lets a timed wait end although others could run.
constexpr int kTimeOutPeriod = 16;

// The system's clock: gcc 12's thread sanitizer does not know waits on the steady one.
auto later(std::chrono::milliseconds patience) {
  return std::chrono::system_clock::now() + patience;
}

}  // namespace

Baton& Baton::get() {
  static Baton* const baton = new Baton;  // threads may end behind static destructors
  return *baton;
}

void Baton::set(bool on, std::uint64_t seed, std::chrono::milliseconds patience) {
  const Lock lock(mutex_);
  on_ = on;
  patience_ = patience;
  ++epoch_;
  rng_.seed(seed);
  members_.clear();
  holder_ = nullptr;
  expected_ = 0;
  lost_ = 0;
  sluice::wait_hooks.store(on ? this : nullptr, std::memory_order_release);
}

namespace {

struct Membership {
  ~Membership() { Baton::get().leave(); }
  std::uint64_t epoch = 0;
  std::shared_ptr<void> member;
};
thread_local Membership membership;

}  // namespace

// The caller's membership, made at its first visit. Returns when it has the baton.
Baton::Member& Baton::join(Lock& lock) {
  if (membership.epoch != epoch_ || membership.member == nullptr) {
    auto made = std::make_shared<Member>();
    membership.epoch = epoch_;
    membership.member = made;
    members_.push_back(made);
    arrived_.notify_all();
    if (holder_ == nullptr) holder_ = made.get();
    await_turn(*made, lock);
    return *made;
  }
  Member& self = *static_cast<Member*>(membership.member.get());
  if (holder_ != &self) {  // it had lost the baton, or was outside
    self.state = Member::State::kRunnable;
    if (holder_ == nullptr) holder_ = &self;
    await_turn(self, lock);
  }
  return self;
}

// Chooses the next holder among those that can run. Waits may time out when nobody else can run,
// and now and then while others do.
void Baton::pass(Member& self) {
  std::vector<Member*> candidates;
  for (const auto& member : members_) {
    if (member->state == Member::State::kRunnable) candidates.push_back(member.get());
  }
  if (candidates.empty() || rng_() % kTimeOutPeriod == 0) {
    for (const auto& member : members_) {
      if (member->state == Member::State::kBlocked && member->may_time_out) {
        candidates.push_back(member.get());
      }
    }
  }
  ++turns_;
  holder_ = candidates.empty() ? nullptr : candidates[rng_() % candidates.size()];
  if (holder_ == nullptr) return;
  holder_->state = Member::State::kRunnable;
  if (holder_ != &self) holder_->turn.notify_one();
}

void Baton::await_turn(Member& self, Lock& lock) {
  std::uint64_t seen = turns_;
  while (on_ && holder_ != &self) {
    if (self.turn.wait_until(lock, later(patience_)) == std::cv_status::no_timeout) continue;
    if (holder_ == &self || !on_) break;
    const bool stuck = turns_ == seen;
    seen = turns_;
    if (!stuck) continue;
    if (holder_ != nullptr) {
      holder_->state = Member::State::kOutside;
      ++lost_;
    } else if (self.state != Member::State::kRunnable && !self.may_time_out) {
      continue;  // everybody waits for somebody who takes no part
    }
    pass(self);
  }
}

void Baton::yield() {
  Lock lock(mutex_);
  if (!on_) return;
  Member& self = join(lock);
  if (expected_ > 0) {
    const std::size_t wanted = expected_;
    expected_ = 0;
    // Newcomers find the baton taken and queue, so nobody runs meanwhile.
    if (!arrived_.wait_until(lock, later(patience_), [&] { return members_.size() >= wanted; }))
      ++lost_;
  }
  pass(self);
  await_turn(self, lock);
}

void Baton::expect(int num_threads) {
  Lock lock(mutex_);
  if (!on_) return;
  (void)join(lock);
  expected_ = std::max(expected_, members_.size()) + static_cast<std::size_t>(num_threads);
}

void Baton::leave() {
  const Lock lock(mutex_);
  if (!on_ || membership.epoch != epoch_ || membership.member == nullptr) return;
  const std::shared_ptr<void> self = std::move(membership.member);
  const auto found = std::find_if(members_.begin(), members_.end(),
                                  [&](const auto& member) { return member == self; });
  if (found == members_.end()) return;
  const std::shared_ptr<Member> member = *found;
  members_.erase(found);
  if (holder_ == member.get()) pass(*member);
}

int Baton::num_lost() {
  const Lock lock(mutex_);
  return lost_;
}

void Baton::step_out() {
  Lock lock(mutex_);
  if (!on_) return;
  Member& self = join(lock);
  self.state = Member::State::kOutside;
  pass(self);
}

void Baton::step_in() {
  Lock lock(mutex_);
  if (on_) (void)join(lock);
}

// Gives the baton away until `on` is told of, or, where that may be, time is up.
void Baton::block(Member& self, const void* on, bool may_time_out, Lock& lock) {
  self.state = Member::State::kBlocked;
  self.blocked_on = on;
  self.may_time_out = may_time_out;
  pass(self);
  await_turn(self, lock);
  self.blocked_on = nullptr;
  self.may_time_out = false;
}

void Baton::wake(const void* on, bool all) {
  std::vector<Member*> waiting;
  for (const auto& member : members_) {
    if (member->state == Member::State::kBlocked && member->blocked_on == on) {
      waiting.push_back(member.get());
    }
  }
  if (waiting.empty()) return;
  if (!all) waiting = {waiting[rng_() % waiting.size()]};
  for (Member* const member : waiting) member->state = Member::State::kRunnable;
  if (holder_ != nullptr) return;
  // Told by a thread that takes no part: somebody can go on.
  pass(*waiting.front());
  if (holder_ == waiting.front()) holder_->turn.notify_one();
}

void Baton::lock(std::mutex& mutex) {
  Lock lock(mutex_);
  if (!on_) {
    lock.unlock();
    mutex.lock();
    return;
  }
  Member& self = join(lock);
  // Whoever holds it may be waiting for its turn: to block on it with the baton in hand would be
  // the end.
  while (!mutex.try_lock()) block(self, &mutex, false, lock);
}

void Baton::unlock(std::mutex& mutex) {
  mutex.unlock();
  const Lock lock(mutex_);
  if (on_) wake(&mutex, true);
}

void Baton::wait(const void* condition, std::mutex& mutex,
                 std::optional<std::chrono::nanoseconds> timeout) {
  {
    Lock lock(mutex_);
    Member& self = join(lock);
    mutex.unlock();
    wake(&mutex, true);
    block(self, condition, timeout.has_value(), lock);
  }
  this->lock(mutex);
}

void Baton::notify(const void* condition, bool all) noexcept {
  const Lock lock(mutex_);
  if (on_) wake(condition, all);
}

}  // namespace fake
