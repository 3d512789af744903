#pragma once

#include <atomic>
#include <exception>
#include <memory>
#include <memory_resource>

#include "base/mutex.h"
#include "transfer/ticket.h"

namespace sluice {

/// What all copies of a ticket see. The error is written before the state leaves kPending.
struct Ticket::Shared {
  std::atomic<TicketState> state{TicketState::kPending};
  std::exception_ptr error;
};

/// Memory of tickets: blocks of finished ones serve later ones, so a warm engine allocates none.
class TicketMemory {
 public:
  void* allocate(std::size_t bytes, std::size_t alignment) EXCLUDES(mu_) {
    MutexLock lock(mu_);
    return blocks_.allocate(bytes, alignment);
  }
  void deallocate(void* block, std::size_t bytes, std::size_t alignment) noexcept EXCLUDES(mu_) {
    MutexLock lock(mu_);
    blocks_.deallocate(block, bytes, alignment);
  }

 private:
  Mutex mu_;
  std::pmr::unsynchronized_pool_resource blocks_ GUARDED_BY(mu_);
};

/// Shares ownership of the memory: tickets may outlive the engine that made them.
template <class T>
class TicketAllocator {
 public:
  using value_type = T;

  explicit TicketAllocator(std::shared_ptr<TicketMemory> memory) : memory_(std::move(memory)) {}
  template <class U>
  explicit(false) TicketAllocator(const TicketAllocator<U>& other) : memory_(other.memory()) {}

  [[nodiscard]] T* allocate(std::size_t count) {
    return static_cast<T*>(memory_->allocate(count * sizeof(T), alignof(T)));
  }
  void deallocate(T* block, std::size_t count) noexcept {
    memory_->deallocate(block, count * sizeof(T), alignof(T));
  }
  [[nodiscard]] const std::shared_ptr<TicketMemory>& memory() const noexcept { return memory_; }
  template <class U>
  bool operator==(const TicketAllocator<U>& other) const noexcept {
    return memory_ == other.memory();
  }

 private:
  std::shared_ptr<TicketMemory> memory_;
};

}  // namespace sluice
