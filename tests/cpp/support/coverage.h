#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <iomanip>
#include <iostream>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace sluice::testing {

/// Counts what a random walk has met, and fails the test where it met too little of something.
///
/// Thread safety: none.
class Coverage {
 public:
  /// `rows`: everything that the walk has to meet.
  explicit Coverage(const std::vector<std::string>& rows) {
    for (const std::string& row : rows) counts_.emplace(row, 0);
  }

  /// Errors: fails the test when `row` is not one of the constructor's.
  void hit(std::string_view row, std::int64_t times = 1) {
    const auto found = counts_.find(row);
    if (found == counts_.end()) {
      ADD_FAILURE() << "coverage: got \"" << row << "\", which no table row names";
      return;
    }
    found->second += times;
  }

  /// Prints the table; each row below `least` fails the test.
  void expect_each_at_least(std::int64_t least, std::string_view title, std::uint64_t seed) const {
    std::cout << title << ", seed " << seed << "\n";
    for (const auto& [row, count] : counts_) {
      std::cout << "  " << std::setw(9) << count << "  " << row
                << (count < least ? "  <-- too few" : "") << "\n";
      EXPECT_GE(count, least) << row;
    }
    std::cout << std::flush;
  }

 private:
  std::map<std::string, std::int64_t, std::less<>> counts_;
};

}  // namespace sluice::testing
