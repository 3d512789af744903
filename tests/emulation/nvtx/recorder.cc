// A listener of NVTX, as a profiler is one: a line per call in the domain "sluice" into the file
// that SLUICE_NVTX_LOG names: "push THREAD NAME", "pop THREAD", "start RANGE NAME", "end RANGE".
// Source: the injection protocol of nvtx3/nvtxDetail/nvtxInit.h and nvtxTypes.h.
#include <nvtx3/nvToolsExt.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

namespace {

class Log {
 public:
  static Log& get() {
    static Log log;
    return log;
  }
  void line(const std::string& text) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::fprintf(file_, "%s\n", text.c_str());
    std::fflush(file_);
  }

 private:
  Log() {
    const char* const path = std::getenv("SLUICE_NVTX_LOG");
    file_ = path == nullptr ? nullptr : std::fopen(path, "a");
    if (file_ != nullptr) return;
    std::fprintf(stderr, "nvtx recorder: SLUICE_NVTX_LOG: got %s, expected a file to write\n",
                 path == nullptr ? "nothing" : path);
    std::abort();
  }
  std::mutex mutex_;
  std::FILE* file_ = nullptr;
};

std::atomic<std::uint64_t> ranges{0};

std::string thread() {
  static std::atomic<int> threads{0};
  thread_local const int mine = threads++;
  return std::to_string(mine);
}

std::string name_of(const nvtxEventAttributes_t* attributes) {
  return attributes->messageType == NVTX_MESSAGE_TYPE_ASCII ? attributes->message.ascii : "?";
}

nvtxDomainHandle_t NVTX_API create(const char* name) {
  Log::get().line("domain " + std::string(name));
  // Of other users of NVTX in the process nothing is noted.
  return std::strcmp(name, "sluice") == 0 ? reinterpret_cast<nvtxDomainHandle_t>(&ranges) : nullptr;
}
bool ours(nvtxDomainHandle_t domain) {
  return domain == reinterpret_cast<nvtxDomainHandle_t>(&ranges);
}
int NVTX_API push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* attributes) {
  if (ours(domain)) Log::get().line("push " + thread() + " " + name_of(attributes));
  return 0;
}
int NVTX_API pop(nvtxDomainHandle_t domain) {
  if (ours(domain)) Log::get().line("pop " + thread());
  return 0;
}
nvtxRangeId_t NVTX_API start(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* attributes) {
  const std::uint64_t range = ++ranges;
  if (ours(domain)) {
    Log::get().line("start " + std::to_string(range) + " " + name_of(attributes));
  }
  return range;
}
void NVTX_API end(nvtxDomainHandle_t domain, nvtxRangeId_t range) {
  if (ours(domain)) Log::get().line("end " + std::to_string(range));
}

template <class Function>
void take(NvtxFunctionTable table, unsigned entry, Function function) {
  *table[entry] = reinterpret_cast<NvtxFunctionPointer>(function);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(
    NvtxGetExportTableFunc_t get_export_table) {
  const auto* const callbacks =
      static_cast<const NvtxExportTableCallbacks*>(get_export_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  if (callbacks == nullptr ||
      callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size) == 0 ||
      size <= NVTX_CBID_CORE2_DomainCreateA) {
    return 0;
  }
  take(table, NVTX_CBID_CORE2_DomainCreateA, &create);
  take(table, NVTX_CBID_CORE2_DomainRangePushEx, &push);
  take(table, NVTX_CBID_CORE2_DomainRangePop, &pop);
  take(table, NVTX_CBID_CORE2_DomainRangeStartEx, &start);
  take(table, NVTX_CBID_CORE2_DomainRangeEnd, &end);
  Log::get().line("loaded");
  return 1;
}
