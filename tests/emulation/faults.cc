// SIGSEGV and SIGBUS: of a kernel they are its error, of the host a report and the end.

#include "tests/emulation/faults.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "tests/emulation/block.h"

namespace simt {
namespace {

constexpr std::size_t kSignalStackBytes = 64 << 10;
constexpr int kHostFaultExit = 87;

std::atomic<bool> device_working = false;
pthread_t device_thread;
void* fault_address = nullptr;
HostFaultHandler host_fault_handler = nullptr;
struct sigaction previous_segv, previous_bus;

/// The stack on which this thread catches faults, its own overflow too.
class SignalStack {
 public:
  SignalStack() {
    memory_ = mmap(nullptr, kSignalStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                   -1, 0);
    stack_t stack = {};
    stack.ss_sp = memory_;
    stack.ss_size = kSignalStackBytes;
    sigaltstack(&stack, &replaced_);
  }
  ~SignalStack() {
    sigaltstack(&replaced_, nullptr);
    munmap(memory_, kSignalStackBytes);
  }
  SignalStack(const SignalStack&) = delete;
  SignalStack& operator=(const SignalStack&) = delete;

 private:
  void* memory_ = nullptr;
  stack_t replaced_ = {};
};

[[noreturn]] void report_kernel_fault() {
  fail([&] { return "fault: this thread touches " + describe_for_kernel(fault_address); });
}

[[noreturn]] void report_host_fault() {
  if (host_fault_handler != nullptr) host_fault_handler(fault_address);
  const Region* const region = find_nearest_region(fault_address);
  const bool device = region != nullptr && region->kind == RegionKind::kDevice;
  std::fprintf(stderr, "HOST CODE touches %s memory: %s%s\n", device ? "device" : "pinned",
               describe(fault_address).c_str(),
               device ? "; copy it to the host, and synchronise, first" : "");
  std::fflush(stderr);
  _exit(kHostFaultExit);
}

// Only notes the address: the report allocates, which a handler must not.
void on_fault(int signal_number, siginfo_t* info, void* context) {
  fault_address = info->si_addr;
  const bool of_kernel = on_device_thread() && current != nullptr;
  if (of_kernel || find_nearest_region(fault_address) != nullptr) {
    void (*const report)() = of_kernel ? report_kernel_fault : report_host_fault;
    if (!land_after_signal(context, report)) report();
    return;
  }
  // Not ours: whoever was there before sees it when the instruction runs again.
  sigaction(signal_number, signal_number == SIGSEGV ? &previous_segv : &previous_bus, nullptr);
}

void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  // SA_NODEFER: the handler may never return to where the signal was blocked.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  sigaction(SIGSEGV, &action, &previous_segv);
  sigaction(SIGBUS, &action, &previous_bus);
}

}  // namespace

void prepare_thread() {
  static std::once_flag installed;
  std::call_once(installed, install);
  thread_local const SignalStack stack;
  static_cast<void>(stack);
}

void set_host_fault_handler(HostFaultHandler handler) { host_fault_handler = handler; }

bool on_device_thread() {
  return device_working.load(std::memory_order_relaxed) &&
         pthread_equal(device_thread, pthread_self()) != 0;
}

DeviceWork::DeviceWork() {
  prepare_thread();
  device_thread = pthread_self();
  device_working = true;
}

DeviceWork::~DeviceWork() { device_working = false; }

}  // namespace simt
