#include "base/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "base/error.h"

namespace sluice {
namespace {

void write_string(std::string_view text, std::string& out) {
  static constexpr char kHex[] = "0123456789abcdef";
  out.push_back('"');
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out.push_back('\\');
      out.push_back(c);
    } else if (byte < 0x20) {
      out += "\\u00";
      out.push_back(kHex[byte >> 4]);
      out.push_back(kHex[byte & 15]);
    } else {
      out.push_back(c);
    }
  }
  out.push_back('"');
}

void write_double(double value, std::string& out) {
  require<InternalError>(std::isfinite(value), [] {
    return std::string("JSON: got an infinity or a NaN, expected a finite number");
  });
  char buffer[32];
  const auto result = std::to_chars(buffer, buffer + sizeof buffer, value);
  const std::string_view text(buffer, static_cast<std::size_t>(result.ptr - buffer));
  out += text;
  if (text.find_first_of(".e") == text.npos) out += ".0";  // stays a double when parsed again
}

void write(const Json& value, std::string& out) {
  if (value.is_null()) {
    out += "null";
  } else if (const bool* flag = value.as_bool()) {
    out += *flag ? "true" : "false";
  } else if (const std::int64_t* negative = value.as_int64()) {
    out += std::to_string(*negative);
  } else if (const std::uint64_t* number = value.as_uint64()) {
    out += std::to_string(*number);
  } else if (const double* real = value.as_double()) {
    write_double(*real, out);
  } else if (const std::string* text = value.as_string()) {
    write_string(*text, out);
  } else if (const Json::Array* items = value.as_array()) {
    out.push_back('[');
    for (std::size_t i = 0; i < items->size(); ++i) {
      if (i > 0) out.push_back(',');
      write((*items)[i], out);
    }
    out.push_back(']');
  } else {
    out.push_back('{');
    bool first = true;
    for (const auto& [key, member] : *value.as_object()) {
      if (!first) out.push_back(',');
      first = false;
      write_string(key, out);
      out.push_back(':');
      write(member, out);
    }
    out.push_back('}');
  }
}

}  // namespace

Json::Json(std::int64_t value) {
  if (value < 0) {
    value_ = value;
  } else {
    value_ = static_cast<std::uint64_t>(value);
  }
}

Json::Json(std::uint64_t value) : value_(value) {}

Json Json::object(Object members) {
  const auto by_key = [](const Member& a, const Member& b) { return a.first < b.first; };
  std::sort(members.begin(), members.end(), by_key);
  const auto twice =
      std::adjacent_find(members.begin(), members.end(),
                         [](const Member& a, const Member& b) { return a.first == b.first; });
  require<CheckpointError>(twice == members.end(), [&] {
    return "JSON: got the key \"" + twice->first + "\" twice in one object, expected it once";
  });
  Json out;
  out.value_ = std::move(members);
  return out;
}

std::string Json::dump() const {
  std::string out;
  write(*this, out);
  return out;
}

const Json* Json::find(std::string_view key) const {
  const Object* members = as_object();
  if (members == nullptr) return nullptr;
  const auto found = std::lower_bound(
      members->begin(), members->end(), key,
      [](const Member& member, std::string_view wanted) { return member.first < wanted; });
  return found != members->end() && found->first == key ? &found->second : nullptr;
}

}  // namespace sluice
