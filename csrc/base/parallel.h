#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace sluice {

/// A borrowed callable `void(begin, end)`: no allocation, valid while the callable lives.
class RangeFn {
 public:
  template <class Fn>
  RangeFn(Fn& fn)  // NOLINT(google-explicit-constructor): meant to bind lambdas at the call
      : context_(const_cast<void*>(static_cast<const void*>(&fn))),
        call_([](void* context, std::int64_t begin, std::int64_t end) {
          (*static_cast<Fn*>(context))(begin, end);
        }) {}
  RangeFn(void* context, void (*call)(void*, std::int64_t, std::int64_t))
      : context_(context), call_(call) {}
  void operator()(std::int64_t begin, std::int64_t end) const { call_(context_, begin, end); }

 private:
  void* context_;
  void (*call_)(void*, std::int64_t, std::int64_t);
};

/// Runs one loop on several threads. How the range is cut is up to the implementation, so results
/// must not depend on it: kernels split rows over calls, never a sum.
///
/// Thread safety: one `run` at a time per object.
class ParallelFor {
 public:
  virtual ~ParallelFor() = default;
  /// Upper bound on how many threads `run` uses, the caller's included.
  [[nodiscard]] virtual int num_threads() const = 0;
  /// Calls `fn` on disjoint ranges that cover [0, count), none shorter than `grain` but the last;
  /// returns when all have returned. `fn` must not throw.
  virtual void run(std::int64_t count, std::int64_t grain, RangeFn fn) = 0;
};

/// Everything on the caller's thread.
class SerialFor final : public ParallelFor {
 public:
  [[nodiscard]] int num_threads() const override { return 1; }
  void run(std::int64_t count, std::int64_t /*grain*/, RangeFn fn) override {
    if (count > 0) fn(0, count);
  }
};

/// The core's own pool: `num_threads - 1` workers that spin for at most 50 us, then park; the
/// caller works too. Serves where torch's pool is absent.
[[nodiscard]] std::unique_ptr<ParallelFor> make_thread_pool(int num_threads);

}  // namespace sluice
