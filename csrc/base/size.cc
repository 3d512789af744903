#include "base/size.h"

#include <array>
#include <cstddef>
#include <string>

#include "base/error.h"

namespace sluice {
namespace {

struct Unit {
  std::string_view name;
  std::uint64_t bytes;
};
constexpr std::array kUnits{
    Unit{"", 1},
    Unit{"b", 1},
    Unit{"kb", 1'000},
    Unit{"mb", 1'000'000},
    Unit{"gb", 1'000'000'000},
    Unit{"tb", 1'000'000'000'000},
    Unit{"kib", std::uint64_t{1} << 10},
    Unit{"mib", std::uint64_t{1} << 20},
    Unit{"gib", std::uint64_t{1} << 30},
    Unit{"tib", std::uint64_t{1} << 40},
};
constexpr std::size_t kMaxDigits = 18;  // of either part: no sum or product below overflows

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_space(char c) { return c == ' ' || c == '\t'; }

[[noreturn]] void refuse(std::string_view text) {
  throw ConfigError("size: got \"" + std::string(text.substr(0, 64)) +
                    "\", expected bytes, an amount such as \"6GiB\", \"1.5GB\" or \"512MiB\" below "
                    "2^63 bytes, or "
                    "a share from above \"0%\" to \"100%\"");
}

struct Decimal {
  std::uint64_t whole = 0;
  std::uint64_t fraction = 0;
  std::uint64_t scale = 1;  // fraction / scale is what follows the point
};

/// Takes the number off the front of `rest`.
Decimal take_decimal(std::string_view text, std::string_view& rest) {
  Decimal number;
  std::size_t at = 0;
  std::size_t digits = 0;
  for (; at < rest.size() && is_digit(rest[at]); ++at, ++digits) {
    if (digits == kMaxDigits) refuse(text);
    number.whole = number.whole * 10 + static_cast<std::uint64_t>(rest[at] - '0');
  }
  if (digits == 0) refuse(text);
  if (at < rest.size() && rest[at] == '.') {
    ++at;
    std::size_t decimals = 0;
    for (; at < rest.size() && is_digit(rest[at]); ++at, ++decimals) {
      if (decimals == kMaxDigits) refuse(text);
      number.fraction = number.fraction * 10 + static_cast<std::uint64_t>(rest[at] - '0');
      number.scale *= 10;
    }
    if (decimals == 0) refuse(text);
  }
  rest.remove_prefix(at);
  return number;
}

}  // namespace

Size parse_size(std::string_view text) {
  std::string_view rest = text;
  while (!rest.empty() && is_space(rest.front())) rest.remove_prefix(1);
  while (!rest.empty() && is_space(rest.back())) rest.remove_suffix(1);
  const Decimal number = take_decimal(text, rest);
  while (!rest.empty() && is_space(rest.front())) rest.remove_prefix(1);
  if (rest == "%") {
    const double percent = static_cast<double>(number.whole) +
                           static_cast<double>(number.fraction) / static_cast<double>(number.scale);
    if (number.whole + number.fraction == 0) refuse(text);
    if (number.whole > 100 || (number.whole == 100 && number.fraction != 0)) refuse(text);
    return {.kind = Size::Kind::kShare, .bytes = 0, .share = percent / 100.0};
  }
  std::string unit(rest);
  for (char& c : unit) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  for (const Unit& known : kUnits) {
    if (unit != known.name) continue;
    using Wide = unsigned __int128;
    const Wide bytes =
        Wide{number.whole} * known.bytes + Wide{number.fraction} * known.bytes / number.scale;
    if (bytes >> 63 != 0) refuse(text);
    return {.kind = Size::Kind::kBytes, .bytes = static_cast<std::uint64_t>(bytes), .share = 0};
  }
  refuse(text);
}

}  // namespace sluice
