#include "engine/staged_path.h"

#include <algorithm>
#include <memory_resource>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/log_ring.h"
#include "base/mutex.h"
#include "transfer/store_chunks.h"

namespace sluice {
namespace {

class Path final : public StagedPath {
 public:
  explicit Path(StagedPathParts parts)
      : device_(parts.device),
        clock_(parts.clock),
        host_(std::move(parts.host)),
        store_chunks_(parts.store),
        slot_chunks_([store = parts.store](ExpertKey key) { return store->slot_bytes(key.layer); },
                     parts.copy_chunk_bytes),
        read_link_(std::move(parts.store_link)),
        copy_link_(std::move(parts.copy_link)) {
    if (!copy_link_) {
      copy_link_ = make_copy_link(device_, parts.copy_chunk_bytes,
                                  [this](std::exception_ptr error) { broken_(std::move(error)); });
    }
  }
  ~Path() override { close(); }

  void connect(Finished finished, Broken broken) override {
    finished_ = std::move(finished);
    broken_ = std::move(broken);
    reads_ = std::make_unique<TransferEngine>(store_chunks_, *read_link_,
                                              [this](const LoadRequest& read, TicketState state,
                                                     std::exception_ptr error, std::uint64_t) {
                                                try {
                                                  read_ended(read, state, std::move(error));
                                                } catch (...) {
                                                  broken_(std::current_exception());
                                                }
                                              });
    copies_ =
        std::make_unique<TransferEngine>(slot_chunks_, *copy_link_,
                                         [this](const LoadRequest& copy, TicketState state,
                                                std::exception_ptr error, std::uint64_t bytes) {
                                           try {
                                             copy_ended(copy, state, std::move(error), bytes);
                                           } catch (...) {
                                             broken_(std::current_exception());
                                           }
                                         });
    read_link_->set_landed(
        [this](std::uint64_t token, std::exception_ptr error, std::uint64_t bytes_read) {
          guarded([&] {
            reads_->landed(token, std::move(error), bytes_read);
            step();
            host_->pin_filled();
          });
        });
    copy_link_->set_landed(
        [this](std::uint64_t token, std::exception_ptr error, std::uint64_t bytes) {
          guarded([&] { copies_->landed(token, std::move(error), bytes); });
        });
    copy_link_->set_retired(
        [this](std::uint64_t token) { guarded([&] { copies_->retired(token); }); });
  }
  void reserve(std::int32_t loads) override {
    copies_->reserve(loads);
    reads_->reserve(loads);
    const MutexLock lock(mu_);
    loads_.reserve(static_cast<std::size_t>(loads));
  }

  void submit(const LoadRequest& request) override EXCLUDES(mu_) {
    const MutexLock lock(mu_);
    const auto [place, is_new] = loads_.try_emplace(request.key);
    require<InternalError>(is_new, [&] {
      return "submit: got " + describe(request.key) + ", which is in flight, expected another";
    });
    place->second.request = request;
    if (request.key.layer < layer_) ++step_;
    layer_ = request.key.layer;
    host_->touch({.step = step_, .layer = request.key.layer, .experts = {&request.key.expert, 1}});
    try {
      ++(advance_locked(place->second) ? counters_.host_hits : counters_.host_misses);
    } catch (...) {
      loads_.erase(place);
      throw;
    }
  }
  [[nodiscard]] bool in_flight(ExpertKey key) const override EXCLUDES(mu_) {
    // The copy engine forgets a load a moment after it was reported.
    const MutexLock lock(mu_);
    return loads_.contains(key) || copies_->find(key).has_value();
  }
  void promote(ExpertKey key, Priority priority) override EXCLUDES(mu_) {
    const MutexLock lock(mu_);
    const auto found = loads_.find(key);
    if (found == loads_.end()) return;
    Load& load = found->second;
    load.request.priority = std::min(load.request.priority, priority);
    load.request.deadline = kNever;
    if (load.stage == Stage::kReading) reads_->promote(key, priority);
    if (load.stage == Stage::kCopying) copies_->promote(key, priority);
  }

  bool cancel(ExpertKey key, bool even_demand) override EXCLUDES(mu_) {
    LoadRequest ended;
    Stage stage{};
    {
      const MutexLock lock(mu_);
      const auto found = loads_.find(key);
      if (found == loads_.end()) return false;
      if (!even_demand && !is_hint(found->second.request.priority)) return false;
      stage = found->second.stage;
      if (stage != Stage::kCopying) {
        ended = found->second.request;
        found->second.stage = Stage::kEnding;
      }
    }
    if (stage == Stage::kEnding) return false;
    if (stage == Stage::kCopying) return copies_->cancel(key, even_demand);
    if (stage == Stage::kReading) (void)reads_->cancel(key, true);
    end(ended, TicketState::kCancelled, nullptr, 0);
    return true;
  }
  void cancel_all() override EXCLUDES(mu_) {
    std::vector<ExpertKey> keys;
    {
      const MutexLock lock(mu_);
      filling_ = false;
      for (const auto& [key, load] : loads_) keys.push_back(key);
    }
    for (const ExpertKey key : keys) (void)cancel(key, true);
    reads_->cancel_all();
  }

  Nanos step() override {
    drop_expired();
    {
      const MutexLock lock(mu_);
      advance_waiting_locked();
      fill_locked();
    }
    const Nanos now = clock_.now();
    return std::min(reads_->step(now), copies_->step(now));
  }

  [[nodiscard]] std::int32_t hint_room() const override {
    return std::max(2, read_link_->depth() / 2);
  }
  [[nodiscard]] std::uint64_t workspace_bytes() const override {
    return read_link_->workspace_bytes() + copy_link_->workspace_bytes();
  }
  void close() override EXCLUDES(mu_) {
    {
      const MutexLock lock(mu_);
      filling_ = false;
    }
    if (reads_) reads_->cancel_all();
    read_link_->close();
    copy_link_->close();
    host_->close();
  }

  [[nodiscard]] StagedCounters counters() const override EXCLUDES(mu_) {
    const MutexLock lock(mu_);
    return counters_;
  }
  [[nodiscard]] CopyCounters copies() const override { return copy_link_->counters(); }
  [[nodiscard]] HostTierProgress host_tier() const override { return host_->progress(); }

 private:
  enum class Stage : std::uint8_t {
    kWaiting,  // for a host slot
    kReading,  // store → host slot
    kCopying,  // host slot → device slot
    kEnding,   // being reported
  };
  struct Load {
    LoadRequest request;
    Stage stage = Stage::kWaiting;
    HostTier::Source source;
  };

  template <class Work>
  void guarded(Work work) {
    try {
      work();
      step();
    } catch (...) {  // a link's thread has nobody above it
      broken_(std::current_exception());
    }
  }

  /// Moves a load on from kWaiting as far as it can. True if the host tier held its expert.
  bool advance_locked(Load& load) REQUIRES(mu_) {
    const ExpertKey key = load.request.key;
    if (std::optional<HostTier::Source> source = host_->find(key)) {
      load.source = std::move(*source);
      LoadRequest copy = load.request;
      copy.source = load.source.data;
      copy.source_kind = load.source.kind;
      load.stage = Stage::kCopying;
      (void)copies_->submit(copy);
      return true;
    }
    if (!host_->is_loading(key) && reads_->find(key)) {
      // Its last read is still being reported; a new one would share that ticket and never start.
      load.stage = Stage::kWaiting;
      return false;
    }
    const auto begun = host_->begin_load(key);
    if (const auto* const target = std::get_if<HostTier::Target>(&begun)) {
      submit_read_locked(key, *target, load.request);
      load.stage = Stage::kReading;
    } else if (std::get<Refusal>(begun) == Refusal::kLoading) {
      reads_->promote(key, load.request.priority);
      load.stage = Stage::kReading;
    } else {
      load.stage = Stage::kWaiting;  // for `read_ended` or `copy_ended`, which free a slot
    }
    return false;
  }

  void submit_read_locked(ExpertKey key, const HostTier::Target& target, const LoadRequest& request)
      REQUIRES(mu_) {
    LoadRequest read = request;
    read.slot = target.data;
    read.last_use = target.last_use;
    read.deadline = kNever;
    try {
      (void)reads_->submit(read);
    } catch (...) {  // no memory: a slot that nobody fills would stay taken
      host_->cancel_load(key, target.last_use);
      throw;
    }
  }

  /// Loads that wait for a host slot, best first, as long as there are slots.
  void advance_waiting_locked() REQUIRES(mu_) {
    for (;;) {
      Load* best = nullptr;
      for (auto& [key, load] : loads_) {
        if (load.stage != Stage::kWaiting) continue;
        if (best == nullptr || precedes(load.request, best->request)) best = &load;
      }
      if (best == nullptr) return;
      (void)advance_locked(*best);
      if (best->stage == Stage::kWaiting) return;
    }
  }
  static bool precedes(const LoadRequest& a, const LoadRequest& b) {
    if (a.priority != b.priority) return a.priority < b.priority;
    if (a.probability != b.probability) return a.probability > b.probability;
    return a.key < b.key;
  }

  void read_ended(const LoadRequest& read, TicketState state, std::exception_ptr error)
      EXCLUDES(mu_) {
    std::optional<LoadRequest> failed;
    {
      const MutexLock lock(mu_);
      if (state == TicketState::kDone) {
        host_->finish_load(read.key);
        device_.release(read.last_use);
      } else if (state == TicketState::kFailed) {
        host_->fail_load(read.key, read.last_use);
      } else {
        host_->cancel_load(read.key, read.last_use);
      }
      const auto found = loads_.find(read.key);
      if (state == TicketState::kFailed && found == loads_.end()) {
        if (counters_.fill_errors++ == 0) log_fill_error(read.key, error);
      }
      if (found != loads_.end() && found->second.stage == Stage::kReading) {
        if (state == TicketState::kFailed) {
          failed = found->second.request;
          found->second.stage = Stage::kEnding;
        } else {
          // Done; or cancelled for somebody else, just before this load joined it: once more.
          (void)advance_locked(found->second);
        }
      }
      advance_waiting_locked();
    }
    if (failed) end(*failed, TicketState::kFailed, std::move(error), 0);
  }

  static void log_fill_error(ExpertKey key, const std::exception_ptr& error) noexcept {
    try {
      std::rethrow_exception(error);
    } catch (const std::exception& what) {
      log_ring().log(LogLevel::kWarning, "host tier: filling goes on without " + describe(key) +
                                             ", which raises when it is asked for: " + what.what());
    } catch (...) {  // nothing to say of it
    }
  }

  void copy_ended(const LoadRequest& copy, TicketState state, std::exception_ptr error,
                  std::uint64_t bytes) EXCLUDES(mu_) {
    {
      const MutexLock lock(mu_);
      Load& load = loads_.at(copy.key);
      load.stage = Stage::kEnding;
      // Chunks that were enqueued may still be read, also of a load that was cancelled.
#if defined(SLUICE_PLANT_I2_HOST)
      const EventHandle copied{};  // planted: a reader writes where a copy still reads
#else
      const EventHandle copied = bytes > 0 ? device_.record(device_.copy_stream()) : EventHandle{};
#endif
      host_->give_back(copy.key, load.source, copied);
    }
    end(copy, state, std::move(error), bytes);
  }

  /// Reports a load whose stage is kEnding, then forgets it.
  void end(const LoadRequest& request, TicketState state, std::exception_ptr error,
           std::uint64_t bytes) EXCLUDES(mu_) {
    finished_(request, state, error, bytes);
    const MutexLock lock(mu_);
    loads_.erase(request.key);
    advance_waiting_locked();
  }

  /// Guesses that have not begun by their deadline, while they wait for the host.
  void drop_expired() EXCLUDES(mu_) {
    const Nanos now = clock_.now();
    std::vector<LoadRequest> expired;
    {
      const MutexLock lock(mu_);
      for (auto& [key, load] : loads_) {
        if (load.stage != Stage::kWaiting || load.request.deadline > now) continue;
        if (!is_hint(load.request.priority)) continue;
        load.stage = Stage::kEnding;
        expired.push_back(load.request);
      }
    }
    for (const LoadRequest& request : expired) end(request, TicketState::kCancelled, nullptr, 0);
  }

  /// Keeps the store's link busy with what the tier has room for.
  void fill_locked() REQUIRES(mu_) {
    while (filling_ && std::cmp_less(reads_->depth().queued, read_link_->depth())) {
      const auto begun = host_->begin_fill();
      if (!begun) return;
      if (reads_->find(begun->first)) {  // still being reported: later
        host_->cancel_load(begun->first, begun->second.last_use);
        return;
      }
      submit_read_locked(begun->first, begun->second,
                         {.key = begun->first, .priority = Priority::kFill});
    }
  }

  Device& device_;
  const Clock& clock_;
  const std::unique_ptr<HostTier> host_;
  const StoreChunks store_chunks_;
  const SlotChunks slot_chunks_;
  const std::unique_ptr<Link> read_link_;
  std::unique_ptr<CopyLink> copy_link_;
  Finished finished_;
  Broken broken_;
  std::unique_ptr<TransferEngine> reads_;
  std::unique_ptr<TransferEngine> copies_;

  mutable Mutex mu_;
  std::pmr::unsynchronized_pool_resource nodes_ GUARDED_BY(mu_);
  std::pmr::unordered_map<ExpertKey, Load> loads_ GUARDED_BY(mu_){&nodes_};
  std::int64_t step_ GUARDED_BY(mu_) = 0;
  LayerIdx layer_ GUARDED_BY(mu_){};
  bool filling_ GUARDED_BY(mu_) = true;
  StagedCounters counters_ GUARDED_BY(mu_);
};

}  // namespace

std::unique_ptr<StagedPath> make_staged_path(StagedPathParts parts) {
  return std::make_unique<Path>(std::move(parts));
}

}  // namespace sluice
