// The memory that kernels may touch, and what happens to the host that touches it.

#include "tests/emulation/registry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <thread>

#include "tests/emulation/harness.h"
#include "tests/emulation/shadow.h"

namespace simt::testing {
namespace {

using ::testing::HasSubstr;

TEST(Registry, NamesAddressesInAndAroundARegion) {
  Array<char> slab(8192, "slab");
  EXPECT_EQ(describe(slab.data() + 4096), "device slab+4096 of 8192 bytes");
  EXPECT_EQ(describe(slab.data() + 8192), "device slab+8192 of 8192 bytes (past the end)");
  EXPECT_EQ(describe(slab.data() - 1), "device slab-1 of 8192 bytes (before the start)");
  EXPECT_THAT(describe(slab.data() + 8192 + (20 << 20)), HasSubstr("(no device or pinned memory)"));
  slab.free();
  EXPECT_EQ(describe(slab.data() + 1), "device slab+1 of 8192 bytes (freed)");
}

TEST(Registry, FindsLiveRegionsOnly) {
  Array<char> slab(100, "slab");
  ASSERT_NE(find_region(slab.data() + 99), nullptr);
  EXPECT_EQ(find_region(slab.data() + 99)->tag, "slab");
  EXPECT_EQ(find_region(slab.data() + 100), nullptr);
  slab.free();
  EXPECT_EQ(find_region(slab.data()), nullptr);
  ASSERT_NE(find_nearest_region(slab.data()), nullptr);
  EXPECT_TRUE(find_nearest_region(slab.data())->freed);
}

TEST(Registry, ForgetsFreedRegionsUnderNewOnes) {
  alignas(16) static char memory[64];
  add_region(memory, 64, RegionKind::kPinned, "old");
  remove_region(memory);
  add_region(memory + 16, 16, RegionKind::kPinned, "new");
  EXPECT_EQ(describe(memory + 16), "pinned new+0 of 16 bytes");
  EXPECT_EQ(describe(memory + 8), "pinned new-8 of 16 bytes (before the start)");
  remove_region(memory + 16);
}

TEST(Registry, PoisonsWithNaN) {
  Array<float> slab(4);
  slab.fill(1.0f);
  poison(slab.data() + 1, 4);
  EXPECT_EQ(slab[0], 1.0f);
  EXPECT_NE(slab[1], slab[1]);
}

TEST(Registry, ForbidsRangesByTheByte) {
  Array<char> slab(64);
  forbid(slab.data() + 16, 4);
  EXPECT_FALSE(is_forbidden(slab.data(), 16));
  EXPECT_TRUE(is_forbidden(slab.data(), 17));
  EXPECT_TRUE(is_forbidden(slab.data() + 19, 1));
  EXPECT_FALSE(is_forbidden(slab.data() + 20, 8));
  EXPECT_TRUE(is_forbidden(slab.data(), 64));
  clear_forbidden();
  EXPECT_FALSE(is_forbidden(slab.data(), 64));
}

TEST(RegionShadow, KeepsABitPerByte) {
  RegionShadow shadow(1000);
  EXPECT_FALSE(shadow.any_undefined(0, 1000));
  shadow.set_undefined(3, 50, true);
  EXPECT_FALSE(shadow.any_undefined(0, 3));
  EXPECT_TRUE(shadow.any_undefined(0, 4));
  EXPECT_TRUE(shadow.undefined(52));
  EXPECT_FALSE(shadow.undefined(53));
  shadow.set_undefined(10, 30, false);
  EXPECT_FALSE(shadow.any_undefined(10, 30));
  EXPECT_TRUE(shadow.any_undefined(9, 1));
  EXPECT_TRUE(shadow.any_undefined(40, 1));
  shadow.set_undefined(0, 1000, false);
  EXPECT_FALSE(shadow.any_undefined(0, 1000));
}

TEST(RegionShadow, CopiesDefinedness) {
  if (!checked()) GTEST_SKIP() << "this flavour keeps no marks";
  Array<char> from(16), to(32);
  from.fill(1);
  to.fill(1);
  poison(from.data() + 5, 2);
  copy_definedness(to.data() + 10, from.data(), 16);
  const RegionShadow& shadow = *find_region(to.data())->shadow;
  for (std::size_t i = 0; i < 32; ++i) EXPECT_EQ(shadow.undefined(i), i == 15 || i == 16) << i;
}

class HostFault : public ::testing::Test {
 protected:
  HostFault() { prepare_thread(); }
  // Device memory that the host may not touch, as the fake runtime maps it.
  static char* closed(Array<char>& slab) {
    mprotect(slab.data(), slab.size(), PROT_NONE);
    return slab.data();
  }
  Array<char> slab_{8192, "slab"};
};
using HostFaultDeathTest = HostFault;

TEST_F(HostFaultDeathTest, NamesTheMemoryAndExits) {
  volatile char* const p = closed(slab_);
  EXPECT_EXIT((void)p[100], ::testing::ExitedWithCode(87),
              "HOST CODE touches device memory: device slab\\+100 of 8192 bytes; copy it");
  EXPECT_EXIT(p[8192] = 1, ::testing::ExitedWithCode(87), "slab\\+8192 .*past the end");
}

TEST_F(HostFaultDeathTest, IsCaughtOnOtherThreads) {
  volatile char* const p = closed(slab_);
  const auto touch = [&] {
    std::thread([&] {
      prepare_thread();
      (void)p[7];
    }).join();
  };
  EXPECT_EXIT(touch(), ::testing::ExitedWithCode(87), "device slab\\+7 of");
}

TEST_F(HostFaultDeathTest, AsksTheHandlerFirst) {
  volatile char* const p = closed(slab_);
  const auto touch = [&] {
    set_host_fault_handler([](const void*) {
      std::fputs("asked\n", stderr);
      _exit(5);
    });
    (void)p[0];
  };
  EXPECT_EXIT(touch(), ::testing::ExitedWithCode(5), "asked");
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they have handlers of theirs
TEST_F(HostFaultDeathTest, LeavesOtherFaultsAlone) {
  volatile char* const nowhere = nullptr;
  EXPECT_EXIT((void)*nowhere, ::testing::KilledBySignal(SIGSEGV), "^$");
}
#endif

}  // namespace
}  // namespace simt::testing
