#include "tests/emulation/simt.h"

#include <gtest/gtest.h>

#include "tests/emulation/harness.h"
#include "tests/emulation/simt_test_kernels.h"

namespace simt::testing {
namespace {

TEST(Simt, Smoke) {
  for (Order order : kOrders) {
    const With with({.order = order});
    Array<int> in(256), out(256);
    in.generate([](std::size_t i) { return static_cast<int>(i * 3); });
    EXPECT_EQ(run("shift", {.block = 256}, shift_kernel, in.data(), out.data()), "");
    for (int i = 0; i < 256; ++i) ASSERT_EQ(out[i], (i + 5) % 256 * 3);
  }
}

}  // namespace
}  // namespace simt::testing
