// Stacks and switches, with the machine's own switch and with ucontext (SIMT_UCONTEXT).

#include "tests/emulation/fiber.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <thread>
#include <vector>

namespace simt {
namespace {

Context* running = nullptr;
std::vector<int> trace;

void resume_it(Context& context) {
  running = &context;
  resume(context);
}

void leave() { suspend(*running, true); }

void count_to_three() {
  entered();
  for (int i = 1; i <= 3; ++i) {
    trace.push_back(i);
    suspend(*running, false);
  }
  leave();
}

TEST(Fiber, GoesOnWhereItStopped) {
  trace.clear();
  Context context;
  prepare(context, count_to_three);
  for (int i = 0; i < 3; ++i) {
    resume_it(context);
    trace.push_back(-1);
  }
  release(context);
  EXPECT_EQ(trace, (std::vector<int>{1, -1, 2, -1, 3, -1}));
}

TEST(Fiber, KeepsManyApart) {
  trace.clear();
  std::vector<Context> contexts(50);
  for (Context& context : contexts) prepare(context, count_to_three);
  for (int round = 0; round < 2; ++round) {
    for (Context& context : contexts) resume_it(context);
  }
  for (Context& context : contexts) release(context);
  ASSERT_EQ(trace.size(), 100u);
  for (std::size_t i = 0; i < 100; ++i) EXPECT_EQ(trace[i], i < 50 ? 1 : 2);
}

std::uintptr_t alignment = 0;
double sum = 0;

// An aligned vector store faults on a stack that starts eight bytes off, and calls see it too.
void use_its_stack() {
  entered();
  alignas(16) volatile float vector[4] = {1, 2, 3, 4};
  alignment = reinterpret_cast<std::uintptr_t>(&vector[0]) % 16;
  volatile char deep[kStackBytes / 2];
  for (std::size_t i = 0; i < sizeof(deep); i += 4096) deep[i] = 1;
  for (const volatile float& element : vector) sum += static_cast<double>(element);
  leave();
}

TEST(Fiber, HasAnAlignedStackOfItsSize) {
  Context context;
  prepare(context, use_its_stack);
  alignment = 1;
  sum = 0;
  resume_it(context);
  release(context);
  EXPECT_EQ(alignment, 0u);
  EXPECT_EQ(sum, 10.0);
}

double kept = 0;

// Values that live in registers across a switch.
void keep_registers() {
  entered();
  std::uint64_t a = 1, b = 2, c = 3, d = 4, e = 5, f = 6;
  for (int i = 0; i < 4; ++i) {
    a += b;
    b ^= c << 1;
    c += d;
    d ^= e;
    e += f;
    f ^= a;
    suspend(*running, false);
  }
  kept = static_cast<double>(a + b + c + d + e + f);
  leave();
}

TEST(Fiber, KeepsRegistersAcrossASwitch) {
  std::uint64_t a = 1, b = 2, c = 3, d = 4, e = 5, f = 6;
  for (int i = 0; i < 4; ++i) {
    a += b;
    b ^= c << 1;
    c += d;
    d ^= e;
    e += f;
    f ^= a;
  }
  Context first, second;
  prepare(first, keep_registers);
  prepare(second, keep_registers);
  for (int i = 0; i < 5; ++i) {
    resume_it(first);
    EXPECT_EQ(kept, i < 4 ? 0.0 : static_cast<double>(a + b + c + d + e + f));
    if (i < 4) resume_it(second);
  }
  release(first);
  release(second);
  kept = 0;
}

TEST(Fiber, MayBeDroppedAndItsStackUsedAgain) {
  Context dropped;
  prepare(dropped, count_to_three);
  resume_it(dropped);
  const char* const stack = dropped.stack;
  release(dropped);
  EXPECT_EQ(dropped.stack, nullptr);
  trace.clear();
  Context context;
  prepare(context, count_to_three);
  EXPECT_EQ(context.stack, stack);
  resume_it(context);
  release(context);
  EXPECT_EQ(trace, std::vector<int>{1});
}

TEST(Fiber, MayBeResumedByAnotherThread) {
  trace.clear();
  Context context;
  prepare(context, count_to_three);
  resume_it(context);
  std::thread([&] { resume_it(context); }).join();
  resume_it(context);
  release(context);
  EXPECT_EQ(trace, (std::vector<int>{1, 2, 3}));
}

}  // namespace
}  // namespace simt
