#include <algorithm>
#include <utility>

#include "transfer/store_chunks.h"
#include "transfer/transfer_path.h"

namespace sluice {
namespace {

class DirectPath final : public TransferPath {
 public:
  DirectPath(std::shared_ptr<const ExpertStore> store, std::unique_ptr<Link> link,
             const Clock& clock)
      : clock_(clock), chunks_(std::move(store)), link_(std::move(link)) {}
  ~DirectPath() override { link_->close(); }

  void connect(Finished finished, Broken broken) override {
    engine_ = std::make_unique<TransferEngine>(chunks_, *link_, std::move(finished));
    link_->set_landed([this, broken = std::move(broken)](
                          std::uint64_t token, std::exception_ptr error, std::uint64_t bytes_read) {
      try {
        engine_->landed(token, std::move(error), bytes_read);
        step();
      } catch (...) {  // a reader's thread has nobody above it
        broken(std::current_exception());
      }
    });
  }
  void reserve(std::int32_t loads) override { engine_->reserve(loads); }

  void submit(const LoadRequest& request) override { (void)engine_->submit(request); }
  [[nodiscard]] bool in_flight(ExpertKey key) const override {
    return engine_->find(key).has_value();
  }
  void promote(ExpertKey key, Priority priority) override { engine_->promote(key, priority); }
  bool cancel(ExpertKey key, bool even_demand) override {
    return engine_->cancel(key, even_demand);
  }
  void cancel_all() override { engine_->cancel_all(); }
  Nanos step() override { return engine_->step(clock_.now()); }

  [[nodiscard]] std::int32_t hint_room() const override { return std::max(1, link_->depth() / 2); }
  [[nodiscard]] std::uint64_t workspace_bytes() const override { return link_->workspace_bytes(); }
  void close() override { link_->close(); }

 private:
  const Clock& clock_;
  const StoreChunks chunks_;
  const std::unique_ptr<Link> link_;
  std::unique_ptr<TransferEngine> engine_;
};

}  // namespace

std::unique_ptr<TransferPath> make_direct_path(std::shared_ptr<const ExpertStore> store,
                                               std::unique_ptr<Link> link, const Clock& clock) {
  return std::make_unique<DirectPath>(std::move(store), std::move(link), clock);
}

}  // namespace sluice
