#include "device/nvtx.h"

#include "base/error.h"
#include "base/log_ring.h"

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>

namespace sluice {
namespace {

nvtxEventAttributes_t named(const char* name) {
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
  attributes.message.ascii = name;
  return attributes;
}

class NvtxRanges final : public Ranges {
 public:
  NvtxRanges() : domain_(nvtxDomainCreateA("sluice")) {
    if (domain_ != nullptr) return;
    log_ring().log(LogLevel::kWarning,
                   "SLUICE_NVTX: got no profiler in this process, expected one that listens to "
                   "NVTX; run it under nsys");
  }
  ~NvtxRanges() override { nvtxDomainDestroy(domain_); }
  NvtxRanges(const NvtxRanges&) = delete;
  NvtxRanges& operator=(const NvtxRanges&) = delete;

  void push(const char* name) noexcept override {
    const nvtxEventAttributes_t attributes = named(name);
    (void)nvtxDomainRangePushEx(domain_, &attributes);
  }
  void pop() noexcept override { (void)nvtxDomainRangePop(domain_); }
  [[nodiscard]] std::uint64_t start(const char* name) noexcept override {
    const nvtxEventAttributes_t attributes = named(name);
    return nvtxDomainRangeStartEx(domain_, &attributes);
  }
  void end(std::uint64_t range) noexcept override { nvtxDomainRangeEnd(domain_, range); }

 private:
  const nvtxDomainHandle_t domain_;
};

}  // namespace

std::unique_ptr<Ranges> make_nvtx_ranges() { return std::make_unique<NvtxRanges>(); }

}  // namespace sluice

#else  // the wheels of the CUDA runtime are without them

namespace sluice {

std::unique_ptr<Ranges> make_nvtx_ranges() {
  throw ConfigError(
      "SLUICE_NVTX: got 1 in a build without NVTX, expected nvtx3/nvToolsExt.h beside its CUDA "
      "headers; build sluice with a whole CUDA toolkit, or unset it");
}

}  // namespace sluice

#endif
