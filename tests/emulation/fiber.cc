#include "tests/emulation/fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ucontext makes a system call per switch; it serves machines without a switch of their own below.
// SIMT_UCONTEXT forces it, for its test.
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_SWITCH_X86_64 1
#endif

namespace simt {
namespace {

constexpr unsigned kColours = 64;
constexpr std::size_t kColourBytes = 512;

void* host_stopped = nullptr;
#if defined(__SANITIZE_ADDRESS__)
void* host_fake_stack = nullptr;
const void* host_stack = nullptr;
std::size_t host_stack_bytes = 0;
#endif

char* map_stack() {
  char* const base = static_cast<char*>(mmap(nullptr, kGuardBytes + kStackBytes, PROT_NONE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (base == MAP_FAILED ||
      mprotect(base + kGuardBytes, kStackBytes, PROT_READ | PROT_WRITE) != 0) {
    std::perror("emulation: no memory for the stack of a thread; run fewer resident blocks");
    std::abort();
  }
  return base + kGuardBytes;
}

std::vector<char*>& free_stacks() {
  static auto& stacks = *new std::vector<char*>;  // outlives every grid of a static test fixture
  return stacks;
}

}  // namespace

#if defined(SIMT_SWITCH_X86_64)

// Saves what the System V ABI calls callee-saved and exchanges stacks. MXCSR and the x87 control
// word are left alone: no kernel changes them.
extern "C" void simt_switch(void** stopped, void* next);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace {

void set_entry(Context& context, void (*entry)()) {
  // `ret` takes the entry and leaves the stack pointer at 8 modulo 16, as a call would; otherwise
  // the first aligned SSE store faults. The zero above it ends a debugger's backtrace.
  void** top = reinterpret_cast<void**>(context.top);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  context.stopped = top - 6;
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
}

void exchange(void** stopped, void* next) { simt_switch(stopped, next); }

void free_stopped(Context& /*context*/) {}

}  // namespace

#else

namespace {

void set_entry(Context& context, void (*entry)()) {
  auto* state = new ucontext_t;
  getcontext(state);
  state->uc_stack.ss_sp = context.stack;
  state->uc_stack.ss_size = static_cast<std::size_t>(context.top - context.stack);
  state->uc_link = nullptr;
  makecontext(state, entry, 0);
  context.stopped = state;
}

void exchange(void** stopped, void* next) {
  if (*stopped == nullptr) *stopped = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*stopped), static_cast<ucontext_t*>(next));
}

void free_stopped(Context& context) { delete static_cast<ucontext_t*>(context.stopped); }

}  // namespace

#endif

void prepare(Context& context, void (*entry)()) {
  auto& pool = free_stacks();
  if (pool.empty()) {
    context.stack = map_stack();
  } else {
    context.stack = pool.back();
    pool.pop_back();
  }
  context.fake_stack = nullptr;
  // Stacks lie a multiple of the page size apart: if all began at the same place of their page, the
  // threads of a block would share a few sets of the cache, and a switch would cost twice as much.
  static unsigned colour = 0;
  context.top = context.stack + kStackBytes - colour++ % kColours * kColourBytes;
  set_entry(context, entry);
}

void release(Context& context) {
#if defined(__SANITIZE_ADDRESS__)
  // A thread that was dropped left its frames' red zones behind.
  __asan_unpoison_memory_region(context.stack, kStackBytes);
#endif
  free_stacks().push_back(context.stack);
  free_stopped(context);
  context = {};
}

void resume(Context& context) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&host_fake_stack, context.stack, kStackBytes);
#endif
  exchange(&host_stopped, context.stopped);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
#endif
}

void entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
}

void suspend(Context& context, bool forever) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &context.fake_stack, host_stack,
                                 host_stack_bytes);
#else
  (void)forever;
#endif
  exchange(&context.stopped, host_stopped);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(context.fake_stack, &host_stack, &host_stack_bytes);
#endif
}

namespace {

// The interrupted stack may be the very thing that overflowed.
alignas(64) char landing_stack[256 << 10];
void (*land_in)() = nullptr;

// Runs in place of the interrupted instruction.
[[maybe_unused]] void landed() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(landing_stack, sizeof(landing_stack));  // of an earlier landing
  void* interrupted = nullptr;
  __sanitizer_start_switch_fiber(&interrupted, landing_stack, sizeof(landing_stack));
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  land_in();
  std::abort();  // a landing never returns
}

}  // namespace

bool land_after_signal([[maybe_unused]] void* signal_context, void (*landing)()) {
  land_in = landing;
#if defined(__linux__) && defined(__x86_64__)
  auto* const state = static_cast<ucontext_t*>(signal_context);
  char* const top = landing_stack + sizeof(landing_stack);
  state->uc_mcontext.gregs[REG_RSP] = reinterpret_cast<greg_t>(top - 8);  // as after a call
  state->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(landed);
  return true;
#else
  return false;
#endif
}

}  // namespace simt
