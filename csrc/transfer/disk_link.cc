#include "transfer/disk_link.h"

#include <utility>

#include "store/reader_pool.h"

namespace sluice {
namespace {

class DiskLink final : public Link {
 public:
  DiskLink(std::shared_ptr<const ExpertStore> store, int io_threads, Device* device)
      : device_(device),
        pool_(
            std::move(store), io_threads,
            [this](std::uint64_t token, std::exception_ptr error, std::uint64_t bytes_read) {
              enter();
              landed_(token, std::move(error), bytes_read);
            },
            [this](EventHandle last_use) {
              enter();
              device_->synchronize(last_use);
            }) {}

  [[nodiscard]] int depth() const override { return pool_.num_threads(); }
  void set_landed(Landed landed) override { landed_ = std::move(landed); }
  void start(const ChunkCopy& copy) override {
    pool_.start(copy.token, copy.key, copy.chunk, copy.slot,
                device_ == nullptr ? EventHandle{} : copy.last_use);
  }
  [[nodiscard]] std::uint64_t workspace_bytes() const override { return pool_.workspace_bytes(); }
  void close() override { pool_.close(); }

 private:
  void enter() {  // the pool's threads are the core's own
    if (device_ != nullptr) (void)device_->enter_thread();
  }

  Device* const device_;
  Landed landed_;
  ReaderPool pool_;  // last: its threads end before what they call
};

}  // namespace

std::unique_ptr<Link> make_disk_link(std::shared_ptr<const ExpertStore> store, int io_threads,
                                     Device* device) {
  return std::make_unique<DiskLink>(std::move(store), io_threads, device);
}

}  // namespace sluice
