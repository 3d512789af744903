#include "store/pack/journal.h"

#include <unistd.h>

#include <charconv>
#include <cstdio>

#include "base/error.h"

namespace sluice {
namespace {

constexpr std::string_view kMagic = "sluice.journal/1";
constexpr std::size_t kSha256Chars = 64;

// The next space-separated word of `line`, taken off its front.
std::string_view take_word(std::string_view& line) {
  const std::size_t end = std::min(line.find(' '), line.size());
  const std::string_view word = line.substr(0, end);
  line.remove_prefix(std::min(end + 1, line.size()));
  return word;
}

template <class T>
bool parse_number(std::string_view word, int base, T& value) {
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value, base);
  return error == std::errc() && end == word.data() + word.size() && !word.empty();
}

}  // namespace

Journal Journal::parse(std::string_view text) {
  Journal journal;
  std::size_t blob = 0;
  for (bool first = true;; first = false) {
    const std::size_t end = text.find('\n');
    if (end == text.npos) return journal;
    std::string_view line = text.substr(0, end);
    text.remove_prefix(end + 1);
    if (first) {
      const bool known = take_word(line) == kMagic;
      const std::string_view sha = take_word(line);
      std::int64_t pid = 0;
      if (!known || sha.size() != kSha256Chars || !parse_number(line, 10, pid)) return journal;
      journal.header_sha256 = sha;
      journal.pid = pid;
      continue;
    }
    std::size_t number = 0;
    std::uint32_t crc = 0;
    const std::string_view word = take_word(line);
    if (!parse_number(word, 10, number) || number != blob || line.size() != 8 ||
        !parse_number(line, 16, crc)) {
      return journal;
    }
    journal.checksums.push_back(crc);
    ++blob;
  }
}

std::string Journal::first_line() const {
  return std::string(kMagic) + " " + header_sha256 + " " + std::to_string(pid) + "\n";
}

std::string Journal::line(std::size_t blob, std::uint32_t crc) {
  char text[40];
  const int length = std::snprintf(text, sizeof text, "%zu %08x\n", blob, crc);
  return std::string(text, static_cast<std::size_t>(length));
}

std::string read_journal(const std::string& path) {
  if (::access(path.c_str(), F_OK) != 0) return {};
  const ReadFile file(path, false);
  std::string text(file.bytes(), '\0');
  file.read_exact(0, text.size(), reinterpret_cast<std::byte*>(text.data()));
  return text;
}

}  // namespace sluice
