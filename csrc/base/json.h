#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace sluice {

/// One JSON value (RFC 8259). Integers are exact; objects keep their keys sorted and unique, so
/// that equal values have equal texts.
class Json {
 public:
  using Array = std::vector<Json>;
  using Member = std::pair<std::string, Json>;
  using Object = std::vector<Member>;  ///< sorted by key

  /// What a hostile text may cost: nesting (stack) and number of values (memory).
  struct Limits {
    int depth = 32;
    std::size_t values = std::size_t{1} << 23;
  };

  Json() = default;
  Json(bool value) : value_(value) {}                      // NOLINT(google-explicit-constructor)
  Json(std::int64_t value);                                // NOLINT(google-explicit-constructor)
  Json(std::uint64_t value);                               // NOLINT(google-explicit-constructor)
  Json(double value) : value_(value) {}                    // NOLINT(google-explicit-constructor)
  Json(std::string value) : value_(std::move(value)) {}    // NOLINT(google-explicit-constructor)
  Json(const char* value) : value_(std::string(value)) {}  // NOLINT(google-explicit-constructor)
  Json(Array value) : value_(std::move(value)) {}          // NOLINT(google-explicit-constructor)
  /// Sorts. Errors: CheckpointError on a key that occurs twice.
  [[nodiscard]] static Json object(Object members);

  /// Parses the whole of `text`. Strict: duplicate keys, invalid UTF-8, lone surrogates, numbers
  /// out of range, trailing bytes are refused.
  /// Errors: CheckpointError with the byte position.
  [[nodiscard]] static Json parse(std::string_view text) { return parse(text, Limits{}); }
  [[nodiscard]] static Json parse(std::string_view text, Limits limits);
  /// The shortest text, keys sorted: equal values, equal bytes.
  /// Errors: InternalError on an infinity or a NaN, which JSON cannot say.
  [[nodiscard]] std::string dump() const;

  [[nodiscard]] bool is_null() const { return std::holds_alternative<std::monostate>(value_); }
  /// The value as what it is, or null.
  [[nodiscard]] const bool* as_bool() const { return std::get_if<bool>(&value_); }
  [[nodiscard]] const std::string* as_string() const { return std::get_if<std::string>(&value_); }
  [[nodiscard]] const Array* as_array() const { return std::get_if<Array>(&value_); }
  [[nodiscard]] const Object* as_object() const { return std::get_if<Object>(&value_); }
  [[nodiscard]] const double* as_double() const { return std::get_if<double>(&value_); }
  /// A negative integer, or a non-negative one (kept apart, so that each is exact).
  [[nodiscard]] const std::int64_t* as_int64() const { return std::get_if<std::int64_t>(&value_); }
  [[nodiscard]] const std::uint64_t* as_uint64() const {
    return std::get_if<std::uint64_t>(&value_);
  }
  /// The member `key` of an object, or null.
  [[nodiscard]] const Json* find(std::string_view key) const;

  bool operator==(const Json&) const = default;

 private:
  std::variant<std::monostate, bool, std::int64_t, std::uint64_t, double, std::string, Array,
               Object>
      value_;
};

}  // namespace sluice
