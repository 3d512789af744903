#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/model.h"
#include "support/stepped_device.h"
#include "support/stepped_link.h"

namespace sluice::testing {

struct RigOptions {
  std::uint64_t device_memory = 0;
  std::string policy = "decayed-lfu";
  int depth = 4;
  std::uint64_t seed = 1;
  bool timeline = false;
  /// Whether events pass when recorded, as on a host device.
  bool events_pass_at_once = true;
  /// RAM as the device, which allocates nothing per event; `device()` is not there then.
  bool host_device = false;
};

/// An engine over a stepped device and a stepped link, on one thread: whenever a forward would
/// wait, `drive` lands one of the chunks in flight, chosen at random.
class Rig {
 public:
  Rig(const Model& model, const RigOptions& options)
      : model_(model), options_(options), rng_(options.seed) {
    std::unique_ptr<Device> device;
    if (options.host_device) {
      device = make_host_device();
    } else {
      auto stepped = std::make_unique<SteppedDevice>();
      stepped->set_events_pass_at_once(options.events_pass_at_once);
      device_ = stepped.get();
      device = std::move(stepped);
    }
    auto link = std::make_unique<SteppedLink>(
        options.depth, [this](const ChunkCopy& copy) { fill(copy); }, device.get());
    link_ = link.get();
    Engine::Parts parts;
    parts.store = model.store();
    parts.device = std::move(device);
    parts.clock = clock_;
    parts.path = make_direct_path(model.store(), std::move(link), *clock_);
    parts.interrupted = [this] { return interrupt && interrupt(); };
    parts.drive = [this] { drive(); };
    engine_ = std::make_unique<Engine>(EngineOptions{.device_memory = options.device_memory,
                                                     .policy = options.policy,
                                                     .io_threads = options.depth,
                                                     .timeline = options.timeline},
                                       std::move(parts), model.specs());
  }

  [[nodiscard]] Engine& engine() { return *engine_; }
  [[nodiscard]] SteppedLink& link() { return *link_; }
  [[nodiscard]] SteppedDevice& device() { return *device_; }
  [[nodiscard]] std::mt19937_64& rng() { return rng_; }

  [[nodiscard]] std::vector<std::byte> forward(const Call& call) {
    std::vector<std::byte> out(call.hidden.size(), std::byte{0xA5});
    engine_->forward(call.args(out.data()));
    return out;
  }

  /// What a forward does instead of waiting; tests may put something else here.
  std::function<void()> on_drive;
  std::function<bool()> interrupt;
  /// Of 1000 chunks, how many fail.
  int failures_per_mille = 0;

  void drive() {
    if (on_drive) {
      on_drive();
    } else {
      land_one();
    }
  }
  /// Lands (or fails) a chunk at random; a device that stands still moves instead.
  void land_one() {
    if (device_ != nullptr) device_->run();
    const std::size_t count = link_->waiting().size();
    if (count == 0) return;
    const std::size_t position = rng_() % count;
    if (std::cmp_less(rng_() % 1000, failures_per_mille)) {
      ++num_failures;
      (void)link_->fail(position, "planted failure");
    } else {
      (void)link_->land(position);
    }
  }
  void land_all() {
    while (!link_->waiting().empty()) {
      engine_->step();
      land_one();
    }
  }
  std::int64_t num_failures = 0;

  /// I1: what the cache calls ready holds its expert's bytes, and nothing else touched them.
  void expect_slots_hold_their_experts() {
    const auto views = engine_->residency();
    for (const auto& [slot, key] : slots_) {
      for (const auto& pool : views) {
        for (const SlotCache::SlotView& view : pool) {
          if (view.state == SlotState::kReady && view.key == key) {
            EXPECT_TRUE(model_.holds(key, slot))
                << "slot of expert (" << to_int(key.layer) << ", " << to_int(key.expert) << ")";
          }
        }
      }
    }
  }
  [[nodiscard]] std::int64_t num_leases() const {
    std::int64_t leases = 0;
    for (const auto& pool : engine_->residency())
      for (const SlotCache::SlotView& view : pool) leases += view.leases;
    return leases;
  }

 private:
  void fill(const ChunkCopy& copy) {
    // An expert has one slot: where an earlier load of it was cancelled lies a part of it.
    std::erase_if(slots_, [&](const auto& each) {
      return each.second == copy.key && each.first != copy.slot;
    });
    slots_[copy.slot] = copy.key;
    model_.store()->read(copy.key, copy.chunk, copy.slot, scratch_);
  }

  const Model& model_;
  const RigOptions options_;
  std::mt19937_64 rng_;
  const std::shared_ptr<const Clock> clock_ = std::make_shared<SteadyClock>();
  IoScratch scratch_;
  std::map<std::byte*, ExpertKey> slots_;  // who was written there last
  SteppedLink* link_ = nullptr;
  SteppedDevice* device_ = nullptr;
  std::unique_ptr<Engine> engine_;
};

}  // namespace sluice::testing
