#include "base/json.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>

#include "base/error.h"

namespace sluice {
namespace {

std::string refusal(const std::string& text, Json::Limits limits = Json::Limits{}) {
  try {
    (void)Json::parse(text, limits);
  } catch (const CheckpointError& error) {
    return error.what();
  }
  ADD_FAILURE() << "accepted: " << text;
  return "";
}

TEST(Json, KeepsIntegersOfBothSignsExact) {
  const Json parsed =
      Json::parse("[9007199254740993,18446744073709551615,-9223372036854775808,-1]");
  const Json::Array& items = *parsed.as_array();
  EXPECT_EQ(*items[0].as_uint64(), 9007199254740993u);
  EXPECT_EQ(*items[1].as_uint64(), std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ(*items[2].as_int64(), std::numeric_limits<std::int64_t>::min());
  EXPECT_EQ(*items[3].as_int64(), -1);
  EXPECT_EQ(items[0].as_int64(), nullptr);
}

TEST(Json, RefusesIntegersThatNo64BitsHold) {
  EXPECT_NE(refusal("18446744073709551616").find("out of range"), std::string::npos);
  EXPECT_NE(refusal("-9223372036854775809").find("out of range"), std::string::npos);
  EXPECT_NE(refusal("1e999").find("out of range"), std::string::npos);
}

TEST(Json, SaysTheSameWhateverTheOrderOfKeys) {
  const Json a = Json::parse(R"({"b":1,"a":{"z":[],"y":null},"c":true})");
  const Json b = Json::parse(R"( { "c" : true, "a":{"y":null,"z":[ ]}, "b":1 } )");
  EXPECT_EQ(a, b);
  EXPECT_EQ(a.dump(), R"({"a":{"y":null,"z":[]},"b":1,"c":true})");
  EXPECT_EQ(a.dump(), b.dump());
}

TEST(Json, GivesBackWhatItWrote) {
  static constexpr char kText[] = "\"\\/\b\f\n\r\t\x01\x1f\x00 \xc3\xa9\xf0\x9f\x99\x82";
  const Json value = Json::object({{"text", std::string(kText, sizeof kText - 1)},
                                   {"real", 0.1},
                                   {"whole real", 2.0},
                                   {"tiny", 5e-324},
                                   {"negative", std::int64_t{-5}},
                                   {"flag", false},
                                   {"none", Json()}});
  EXPECT_EQ(Json::parse(value.dump()), value);
  EXPECT_EQ(Json::parse(value.dump()).dump(), value.dump());
}

TEST(Json, NeverWritesAnInfinity) {
  EXPECT_THROW((void)Json(std::numeric_limits<double>::infinity()).dump(), InternalError);
  EXPECT_THROW((void)Json(std::numeric_limits<double>::quiet_NaN()).dump(), InternalError);
}

TEST(Json, RefusesAKeyThatOccursTwice) {
  EXPECT_NE(refusal(R"({"a":1,"b":2,"a":3})").find("\"a\" twice"), std::string::npos);
  EXPECT_NE(refusal(R"({"a":1,"\u0061":3})").find("twice"), std::string::npos);
}

TEST(Json, BoundsDepthAndNumberOfValues) {
  const std::string deep = std::string(33, '[') + std::string(33, ']');
  EXPECT_NE(refusal(deep).find("nesting"), std::string::npos);
  EXPECT_NO_THROW((void)Json::parse(deep.substr(1, 64)));
  EXPECT_NE(refusal(std::string(1'000'000, '[')).find("nesting"), std::string::npos);
  EXPECT_NE(refusal("[1,2,3,4]", {.depth = 4, .values = 4}).find("values"), std::string::npos);
  EXPECT_NO_THROW((void)Json::parse("[1,2,3]", {.depth = 4, .values = 4}));
}

TEST(Json, TakesWellFormedUtf8Alone) {
  EXPECT_EQ(*Json::parse("\"\xe2\x82\xac\"").as_string(), "\xe2\x82\xac");
  EXPECT_EQ(*Json::parse(R"("\ud83d\ude42\u00e9")").as_string(), "\xf0\x9f\x99\x82\xc3\xa9");
  for (const std::string bad : {"\xff", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82",
                                "\x80", "\xe0\x80\x80"}) {
    std::string quoted("\"");
    quoted.append(bad).append("\"");
    EXPECT_NE(refusal(quoted).find("UTF-8"), std::string::npos);
  }
  EXPECT_NE(refusal(R"("\ud83d")").find("surrogate"), std::string::npos);
  EXPECT_NE(refusal(R"("\ud83dA")").find("surrogate"), std::string::npos);
  EXPECT_NE(refusal(R"("\ude42")").find("surrogate"), std::string::npos);
}

TEST(Json, RefusesWhatIsNearlyJson) {
  for (const std::string bad :
       {"",       " ",   "{",   "[",        "[1,]",    "{\"a\":1,}", "{\"a\"}", "{a:1}",
        "[1 2]",  "01",  "-",   "1.",       ".5",      "1e",         "+1",      "0x1",
        "tru",    "nul", "NaN", "Infinity", "'a'",     "\"a",        "\"\\x\"", "\"\\u12g4\"",
        "\"\n\"", "1 1", "{}x", "[1]]",     "// c\n1", "-01",        "\"\\",    "\"\\u12"}) {
    EXPECT_FALSE(refusal(bad).empty()) << bad;
  }
  EXPECT_FALSE(refusal(std::string("1\0", 2)).empty());
}

TEST(Json, FindsMembersOfObjectsAlone) {
  const Json object = Json::parse(R"({"b":2,"a":1})");
  EXPECT_EQ(*object.find("b")->as_uint64(), 2u);
  EXPECT_EQ(object.find("c"), nullptr);
  EXPECT_EQ(Json::parse("[1]").find("a"), nullptr);
}

}  // namespace
}  // namespace sluice
