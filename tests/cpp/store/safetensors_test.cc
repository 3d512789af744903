#include "store/safetensors.h"

#include <gtest/gtest.h>

#include <string>

#include "base/error.h"
#include "store/temp_folder.h"

namespace sluice {
namespace {

using testing::TempFolder;
using testing::write_file;

SafetensorsHeader parse(const std::string& json, std::uint64_t data_bytes) {
  return parse_safetensors_header(json, 8 + json.size() + data_bytes);
}

std::string file_of(const std::string& json, std::uint64_t data_bytes) {
  std::string out(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) out[i] = static_cast<char>((json.size() >> (8 * i)) & 0xff);
  return out + json + std::string(data_bytes, 'd');
}

TEST(Safetensors, ReadsTensorsInTheOrderOfTheirBytes) {
  const auto header = parse(R"({"__metadata__":{"format":"pt"},)"
                            R"("a":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]},)"
                            R"("b":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
                            R"("empty":{"dtype":"I64","shape":[0,5],"data_offsets":[4,4]},)"
                            R"("f4":{"dtype":"F4","shape":[8],"data_offsets":[4,8]}}   )",
                            20);
  ASSERT_EQ(header.tensors.size(), 4u);
  EXPECT_EQ(header.tensors[0].name, "b");
  EXPECT_EQ(header.tensors[1].name, "empty");
  EXPECT_EQ(header.tensors[2].name, "f4");
  EXPECT_EQ(header.tensors[3].name, "a");
  EXPECT_EQ(header.tensors[3].offset, header.header_bytes + 8);
  EXPECT_EQ(header.tensors[3].shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(header.metadata.at("format"), "pt");
  EXPECT_TRUE(parse("{}", 0).tensors.empty());
}

struct Lie {
  const char* name;
  std::string json;
  std::uint64_t data_bytes;
  const char* message;
};

class SafetensorsLie : public ::testing::TestWithParam<Lie> {};

TEST_P(SafetensorsLie, IsRefusedByName) {
  const Lie& lie = GetParam();
  EXPECT_REFUSED((void)parse(lie.json, lie.data_bytes), CheckpointError, lie.message);
  const TempFolder folder;
  const std::string path = folder.file("lie.safetensors");
  write_file(path, file_of(lie.json, lie.data_bytes));
  EXPECT_REFUSED((void)read_safetensors_header(path), CheckpointError, path);
}

std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"t":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}
std::string two(const std::string& a, const std::string& b) {
  return R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)" + a +
         R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + b + "}}";
}

INSTANTIATE_TEST_SUITE_P(
    All, SafetensorsLie,
    ::testing::Values(
        Lie{"NotAnObject", "[]", 0, "does not begin with '{'"},
        Lie{"Empty", "", 0, "does not begin with '{'"},
        Lie{"LeadingSpace", " {}", 0, "does not begin with '{'"},
        Lie{"BrokenJson", R"({"t":)", 0, "JSON at byte"},
        Lie{"TrailingJson", "{}{}", 0, "trailing bytes"},
        Lie{"DuplicateName",
            two("[0,4]", "[4,8]").replace(two("[0,4]", "[4,8]").find("\"b\""), 3, "\"a\""), 8,
            "\"a\" twice"},
        Lie{"BadUtf8", "{\"\xff\":{}}", 0, "UTF-8"},
        Lie{"TensorIsNoObject", R"({"t":[1]})", 0, "got no object"},
        Lie{"MetadataIsNoObject", R"({"__metadata__":3})", 0, "__metadata__"},
        Lie{"MetadataHoldsANumber", R"({"__metadata__":{"a":3}})", 0, "expected strings alone"},
        Lie{"NoDtype", R"({"t":{"shape":[1],"data_offsets":[0,1]}})", 1, "no \"dtype\""},
        Lie{"NoShape", R"({"t":{"dtype":"U8","data_offsets":[0,1]}})", 1, "no \"shape\""},
        Lie{"NoOffsets", R"({"t":{"dtype":"U8","shape":[1]}})", 1, "no \"data_offsets\""},
        Lie{"UnknownMember", R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}})", 1,
            "4 members"},
        Lie{"ThreeOffsets", one("U8", "[1]", "[0,1,2]"), 1, "an array of two"},
        Lie{"UnknownDtype", one("F128", "[1]", "[0,16]"), 16, "unknown dtype"},
        Lie{"NegativeSide", one("U8", "[-1]", "[0,1]"), 1, "got -1"},
        Lie{"FractionalSide", one("U8", "[1.0]", "[0,1]"), 1, "got 1.0"},
        Lie{"NegativeOffset", one("U8", "[1]", "[-1,0]"), 1, "got -1"},
        Lie{"OverflowingShape", one("U8", "[4294967296,4294967296,2]", "[0,1]"), 1, "overflow"},
        Lie{"OverflowingToAnAgreeingLength", one("F32", "[4611686018427387905]", "[0,4]"), 4,
            "overflow"},
        Lie{"HugeSide", one("U8", "[18446744073709551615]", "[0,1]"), 1, "above 2^63"},
        Lie{"HugeOffset", one("U8", "[1]", "[18446744073709551614,18446744073709551615]"), 1,
            "overflow"},
        Lie{"HalfAByte", one("F4", "[3]", "[0,2]"), 2, "whole bytes"},
        Lie{"ShapeAgainstLength", one("BF16", "[3]", "[0,4]"), 4, "expected 6"},
        Lie{"EndBeforeBegin", one("U8", "[1]", "[1,0]"), 1, "the first not above the second"},
        Lie{"Overlap", two("[0,4]", "[3,7]"), 7, "overlaps tensor \"a\""},
        Lie{"SameBytes", two("[0,4]", "[0,4]"), 4, "overlaps tensor \"a\""},
        Lie{"Gap", two("[0,4]", "[5,9]"), 9, "a gap behind tensor \"a\""},
        Lie{"GapAtTheFront", one("U8", "[1]", "[1,2]"), 2, "a gap behind the header"},
        Lie{"FileTooShort", one("U8", "[9]", "[0,9]"), 8, "the file was cut"},
        Lie{"TrailingBytes", one("U8", "[9]", "[0,9]"), 10, "bytes trail"},
        Lie{"NoTensorsButBytes", "{}", 1, "bytes trail"}),
    [](const auto& instance) { return std::string(instance.param.name); });

TEST(Safetensors, RefusesHeaderLengthsThatLie) {
  const TempFolder folder;
  const std::string path = folder.file("lie.safetensors");
  const std::string whole = file_of("{}", 0);
  for (const std::size_t bytes : {0, 1, 7}) {
    write_file(path, whole.substr(0, bytes));
    EXPECT_REFUSED((void)read_safetensors_header(path), CheckpointError, "expected at least the 8");
  }
  std::string longer = whole;
  longer[0] = 3;
  write_file(path, longer);
  EXPECT_REFUSED((void)read_safetensors_header(path), CheckpointError, "the file was cut");
  for (const std::size_t byte : {4, 7}) {  // 2^32 and more: refused before anything is allocated
    std::string huge = whole;
    huge[byte] = static_cast<char>(0x7f);
    write_file(path, huge);
    EXPECT_REFUSED((void)read_safetensors_header(path), CheckpointError, "no safetensors file");
  }
  EXPECT_REFUSED((void)parse_safetensors_header("{}", 9), CheckpointError, "the file was cut");
}

}  // namespace
}  // namespace sluice
