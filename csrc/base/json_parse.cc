#include <charconv>
#include <cmath>

#include "base/error.h"
#include "base/json.h"
#include "base/utf8.h"

namespace sluice {
namespace {

class Parser {
 public:
  Parser(std::string_view text, Json::Limits limits) : text_(text), limits_(limits) {}

  Json parse_document() {
    Json value = parse_value(0);
    skip_space();
    if (at_ != text_.size()) fail("trailing bytes, expected the end");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw CheckpointError("JSON at byte " + std::to_string(at_) + " of " +
                          std::to_string(text_.size()) + ": got " + what);
  }

  // '\0' stands for the end; a NUL byte in the text fails everywhere a token may start.
  [[nodiscard]] char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_space() {
    while (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t') ++at_;
  }

  void expect(char wanted) {
    if (peek() != wanted || at_ == text_.size()) {
      fail(describe_here() + ", expected '" + wanted + "'");
    }
    ++at_;
  }

  [[nodiscard]] std::string describe_here() const {
    if (at_ == text_.size()) return "the end";
    const auto byte = static_cast<unsigned char>(text_[at_]);
    if (byte >= 0x20 && byte < 0x7f) return std::string("'") + text_[at_] + "'";
    return "byte " + std::to_string(byte);
  }

  Json parse_value(int depth) {
    if (++values_ > limits_.values) {
      fail("more than " + std::to_string(limits_.values) + " values");
    }
    skip_space();
    switch (peek()) {
      case '{':
        return parse_object(depth + 1);
      case '[':
        return parse_array(depth + 1);
      case '"':
        return parse_string();
      case 't':
        return parse_word("true", true);
      case 'f':
        return parse_word("false", false);
      case 'n':
        return parse_word("null", Json());
      default:
        return parse_number();
    }
  }

  Json parse_word(std::string_view word, Json value) {
    if (text_.substr(at_, word.size()) != word) fail("an unknown word, expected a value");
    at_ += word.size();
    return value;
  }

  void check_depth(int depth) const {
    if (depth > limits_.depth) {
      fail("nesting deeper than " + std::to_string(limits_.depth));
    }
  }

  Json parse_array(int depth) {
    check_depth(depth);
    expect('[');
    Json::Array items;
    skip_space();
    if (peek() == ']') {
      ++at_;
      return items;
    }
    for (;;) {
      items.push_back(parse_value(depth));
      skip_space();
      if (peek() == ']') break;
      expect(',');
    }
    ++at_;
    return items;
  }

  Json parse_object(int depth) {
    check_depth(depth);
    expect('{');
    Json::Object members;
    skip_space();
    if (peek() == '}') {
      ++at_;
      return Json::object({});
    }
    for (;;) {
      skip_space();
      if (peek() != '"') fail(describe_here() + ", expected a key in quotes");
      std::string key = parse_string();
      skip_space();
      expect(':');
      members.emplace_back(std::move(key), parse_value(depth));
      skip_space();
      if (peek() == '}') break;
      expect(',');
    }
    ++at_;
    return Json::object(std::move(members));
  }

  std::string parse_string() {
    expect('"');
    std::string out;
    for (;;) {
      if (at_ == text_.size()) fail("the end inside a string");
      const auto byte = static_cast<unsigned char>(text_[at_]);
      if (byte == '"') break;
      if (byte == '\\') {
        parse_escape(out);
      } else if (byte < 0x20) {
        fail("a control character inside a string, expected an escape");
      } else if (byte < 0x80) {
        out.push_back(text_[at_++]);
      } else {
        const std::size_t length = utf8_sequence_length(text_.substr(at_));
        if (length == 0) fail("invalid UTF-8 inside a string");
        out.append(text_.substr(at_, length));
        at_ += length;
      }
    }
    ++at_;
    return out;
  }

  void parse_escape(std::string& out) {
    ++at_;
    static constexpr std::string_view kNames = "\"\\/bfnrt";
    static constexpr std::string_view kValues = "\"\\/\b\f\n\r\t";
    const std::size_t simple = at_ < text_.size() ? kNames.find(text_[at_]) : kNames.npos;
    if (simple != kNames.npos) {
      out.push_back(kValues[simple]);
      ++at_;
      return;
    }
    expect('u');
    std::uint32_t code = parse_hex4();
    if (code >= 0xdc00 && code < 0xe000) fail("a low surrogate without its high one");
    if (code >= 0xd800 && code < 0xdc00) {
      if (text_.substr(at_, 2) != "\\u") fail("a high surrogate without its low one");
      at_ += 2;
      const std::uint32_t low = parse_hex4();
      if (low < 0xdc00 || low >= 0xe000) fail("a high surrogate without its low one");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    append_utf8(code, out);
  }

  std::uint32_t parse_hex4() {
    const std::string_view digits = text_.substr(at_, 4);
    std::uint32_t code = 0;
    const auto [end, error] =
        std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (error != std::errc() || end != digits.data() + 4) fail("an escape without four hex digits");
    at_ += 4;
    return code;
  }

  std::size_t skip_digits() {
    const std::size_t begin = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    return at_ - begin;
  }

  Json parse_number() {
    const std::size_t begin = at_;
    const bool negative = peek() == '-';
    if (negative) ++at_;
    const bool leading_zero = peek() == '0';
    const std::size_t digits = skip_digits();
    if (digits == 0) fail(describe_here() + ", expected a value");
    if (leading_zero && digits > 1) fail("a number with a leading zero");
    bool integer = true;
    if (peek() == '.') {
      integer = false;
      ++at_;
      if (skip_digits() == 0) fail(describe_here() + ", expected a digit behind the point");
    }
    if (peek() == 'e' || peek() == 'E') {
      integer = false;
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      if (skip_digits() == 0) fail(describe_here() + ", expected an exponent");
    }
    const std::string_view literal = text_.substr(begin, at_ - begin);
    if (!integer) return finite(literal);
    if (negative) return convert<std::int64_t>(literal);
    return convert<std::uint64_t>(literal);
  }

  template <class T>
  Json convert(std::string_view literal) const {
    T value{};
    const auto result = std::from_chars(literal.data(), literal.data() + literal.size(), value);
    if (result.ec != std::errc()) fail("a number out of range: " + std::string(literal));
    return value;
  }

  Json finite(std::string_view literal) const {
    double value = 0;
    const auto result = std::from_chars(literal.data(), literal.data() + literal.size(), value);
    if (result.ec != std::errc() || !std::isfinite(value)) {
      fail("a number out of range: " + std::string(literal.substr(0, 32)));
    }
    return value;
  }

  std::string_view text_;
  Json::Limits limits_;
  std::size_t at_ = 0;
  std::size_t values_ = 0;
};

}  // namespace

Json Json::parse(std::string_view text, Limits limits) {
  return Parser(text, limits).parse_document();
}

}  // namespace sluice
