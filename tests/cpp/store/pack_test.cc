#include "store/pack/pack.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <system_error>

#include "base/bytes.h"
#include "base/error.h"
#include "base/json.h"
#include "store/experts.h"
#include "store/fault_disk.h"
#include "store/fingerprint.h"
#include "store/safetensors.h"

namespace sluice {
namespace {

using testing::canonical_expert;
using testing::FaultDisk;
using testing::read_expert;
using testing::read_text;
using testing::seed_of;
using testing::small_manifest;
using testing::TempFolder;
using testing::write_file;
using testing::write_pack;

TEST(Pack, GivesBackEveryExpertThatWasWritten) {
  const TempFolder folder;
  const std::string path = folder.file("a.sluice.safetensors");
  const PackManifest written = small_manifest();
  write_pack(path, written);
  PackManifest manifest;
  const auto store = open_pack(path, {.chunk_bytes = 4096}, &manifest);
  EXPECT_EQ(manifest.to_json(), written.to_json());
  ASSERT_EQ(store->num_layers(), 2);
  for (std::size_t l = 0; l < written.layers.size(); ++l) {
    EXPECT_EQ(store->layer(LayerIdx{static_cast<std::int32_t>(l)}).name, written.layers[l].name);
    for (std::int32_t e = 0; e < written.layers[l].num_experts; ++e) {
      EXPECT_EQ(read_expert(*store, make_key(static_cast<std::int32_t>(l), e)),
                canonical_expert(written.layers[l].layout, seed_of(l, e)));
    }
  }
  EXPECT_EQ(store->slot_bytes(LayerIdx{0}) % 4096, 0u);
  EXPECT_EQ(store->description(), "pack " + path);
  EXPECT_EQ(store->adopted_bytes(), 0u);
}

TEST(Pack, IsALegalSafetensorsFileWhoseBlobsStartOnBlocks) {
  const TempFolder folder;
  const std::string path = folder.file("a.sluice.safetensors");
  write_pack(path, small_manifest());
  const SafetensorsHeader header = read_safetensors_header(path);
  ASSERT_EQ(header.tensors.size(), 6u);
  EXPECT_EQ(header.tensors[0].name, "layers.0.experts.0");
  EXPECT_EQ(header.tensors[4].name, "layers.1.experts.1");
  EXPECT_EQ(header.tensors[5].name, "sluice.crc32c");
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(header.tensors[i].offset % 4096, 0u);
    EXPECT_EQ(header.tensors[i].bytes % 4096, 0u);
    EXPECT_EQ(header.tensors[i].dtype, "U8");
  }
  EXPECT_EQ(header.metadata.at("format"), "sluice.pack/1");
}

TEST(Pack, ReadsAnExpertInOneReadWithoutTheBounceBuffer) {
  const TempFolder folder;
  const std::string path = folder.file("a.sluice.safetensors");
  write_pack(path, small_manifest());
  const auto store = open_pack(path, ExpertStore::Options{});
  AlignedBuffer slot(store->slot_bytes(LayerIdx{0}));
  IoScratch scratch;
  ASSERT_EQ(store->num_chunks(make_key(0, 1)), 1);
  store->read(make_key(0, 1), 0, slot.data(), scratch);
  EXPECT_EQ(scratch.bytes(), 0u);
  EXPECT_EQ(store->counters().bytes_read, slot.bytes());
}

TEST(Pack, HoldsZerosBetweenSectionsWhateverTheSlotHeldThere) {
  const TempFolder folder;
  const PackManifest manifest = small_manifest();
  write_pack(folder.file("a"), manifest);
  PackWriter writer(folder.file("b"), manifest);
  for (std::size_t l = 0; l < manifest.layers.size(); ++l) {
    const ExpertLayout& layout = manifest.layers[l].layout;
    for (std::int32_t e = 0; e < manifest.layers[l].num_experts; ++e) {
      std::vector<std::byte> expert = canonical_expert(layout, seed_of(l, e));
      for (std::size_t i = layout.w13_bytes(); i < layout.w2_offset(); ++i) {
        expert[i] = std::byte{0xee};
      }
      writer.append(expert);
    }
  }
  writer.finish();
  EXPECT_EQ(read_text(folder.file("a")), read_text(folder.file("b")));
}

TEST(Pack, ReadsThePackThatItProvedThoughAnotherTakesItsName) {
  const TempFolder folder;
  const PackManifest manifest = small_manifest();
  const ExpertLayout& layout = manifest.layers[0].layout;
  write_pack(folder.file("a"), manifest);
  PackWriter other(folder.file("b"), manifest);
  for (const StoredLayer& layer : manifest.layers) {
    for (std::int32_t e = 0; e < layer.num_experts; ++e) {
      other.append(canonical_expert(layer.layout, 77));
    }
  }
  other.finish();
  FaultDisk disk;
  disk.before_read = [&] {
    std::error_code gone;  // from the second read on
    std::filesystem::rename(folder.file("b"), folder.file("a"), gone);
  };
  const auto store = open_pack(folder.file("a"), {.verify = Verify::kOff});
  EXPECT_FALSE(std::filesystem::exists(folder.file("b")));
  EXPECT_EQ(read_expert(*store, make_key(0, 1)), canonical_expert(layout, seed_of(0, 1)));
}

// A good pack that a test lies about.
class PackLie : public ::testing::Test {
 protected:
  PackLie() { write_pack(path_, small_manifest()); }

  // Rewrites the header after `change` to its JSON, blobs as they are.
  void rewrite(const std::function<void(Json::Object&)>& change, std::size_t padding = 4096) {
    const std::string text = read_text(path_);
    std::size_t length = 0;
    for (std::size_t i = 0; i < 8; ++i) {
      length |= static_cast<std::size_t>(static_cast<unsigned char>(text[i])) << (8 * i);
    }
    Json::Object members = *Json::parse(text.substr(8, length)).as_object();
    change(members);
    std::string json = Json::object(std::move(members)).dump();
    json.resize(align_up(8 + json.size(), 4096) - 8 + (padding - 4096), ' ');
    std::string out(8, '\0');
    for (std::size_t i = 0; i < 8; ++i) out[i] = static_cast<char>(json.size() >> (8 * i));
    write_file(path_, out + json + text.substr(8 + length));
  }

  static Json& member(Json::Object& members, const std::string& key) {
    for (auto& [name, value] : members) {
      if (name == key) return value;
    }
    ADD_FAILURE() << "no member " << key;
    return members.front().second;
  }

  void rewrite_metadata(const std::string& key, const std::string& value) {
    rewrite([&](Json::Object& members) {
      Json& metadata = member(members, "__metadata__");
      Json::Object strings = *metadata.as_object();
      member(strings, key) = Json(value);
      metadata = Json::object(std::move(strings));
    });
  }
  void rewrite_manifest(const std::string& from, const std::string& to) {
    std::string json = small_manifest().to_json();
    const std::size_t at = json.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    rewrite_metadata("sluice", json.replace(at, from.size(), to));
  }

  void expect_refused(const std::string& what) {
    EXPECT_REFUSED((void)open_pack(path_, ExpertStore::Options{}), CheckpointError, what);
    EXPECT_REFUSED((void)open_pack(path_, ExpertStore::Options{}), CheckpointError, path_);
  }

  TempFolder folder_;
  std::string path_ = folder_.file("a.sluice.safetensors");
};

TEST_F(PackLie, UnfinishedPacksAreRefusedByName) {
  std::filesystem::rename(path_, path_ + ".partial");
  expect_refused("unfinished; run `sluice pack` again");
  EXPECT_REFUSED((void)open_pack(path_ + ".partial", ExpertStore::Options{}), CheckpointError,
                 "got an unfinished one");
  std::filesystem::remove(path_ + ".partial");
  EXPECT_REFUSED((void)open_pack(path_, ExpertStore::Options{}), IoError, path_);
}

TEST_F(PackLie, OrdinarySafetensorsFilesAreRefusedByName) {
  rewrite([](Json::Object& members) {
    std::erase_if(members, [](auto& m) { return m.first == "__metadata__"; });
  });
  expect_refused("got no \"format\"");
}

TEST_F(PackLie, OtherFormatsAndVersionsAreRefused) {
  rewrite_metadata("format", "sluice.pack/2");
  expect_refused("got format \"sluice.pack/2\"");
  rewrite_metadata("format", "sluice.pack/1");
  rewrite_manifest("\"version\":1", "\"version\":2");
  expect_refused("got version 2, expected 1; upgrade");
}

TEST_F(PackLie, ManifestsThatAreNoManifestsAreRefused) {
  for (const auto& [value, what] : std::vector<std::pair<std::string, std::string>>{
           {"", "JSON at byte"},
           {"{", "JSON at byte"},
           {"[]", "got version none"},
           {R"({"version":1})", "got 1 members"},
           {R"({"version":1,"version":1})", "twice"}}) {
    rewrite_metadata("sluice", value);
    expect_refused(what);
  }
}

TEST_F(PackLie, ManifestFieldsOfWrongKindOrSizeAreRefused) {
  for (const auto& [from, to, what] :
       std::vector<std::tuple<std::string, std::string, std::string>>{
           {"\"experts\":3", "\"experts\":0", "\"experts\": got 0"},
           {"\"experts\":3", "\"experts\":-3", "\"experts\": got -3"},
           {"\"experts\":3", "\"experts\":3.0", "\"experts\": got 3.0"},
           {"\"experts\":3", "\"experts\":99999999999", "\"experts\": got 99999999999"},
           {"\"hidden\":48", "\"hidden\":18446744073709551615", "\"hidden\": got 184"},
           {"\"hidden\":48", "\"hidden\":49", "got expert_bytes 10048"},
           {"\"hidden\":48", "\"hidden\":\"48\"", "\"hidden\": got \"48\""},
           {"\"expert_bytes\":10048", "\"expert_bytes\":10049", "got expert_bytes 10049"},
           {"\"bias\":true", "\"bias\":1", "\"bias\": got neither"},
           {"\"dtype\":\"BF16\"", "\"dtype\":\"F64\"", "dtype: got \"F64\""},
           {"\"format\":\"plain\"", "\"format\":\"int4\"", "got \"int4\", expected \"plain\""},
           {"\"name\":", "\"nom\":", "got no \"name\""},
           {"\"model_id\":\"tests/small\"", "\"model_id\":7", "got no string"},
           {"\"gated\":true", "\"gated\":true,\"more\":1", "got 10 members"}}) {
    rewrite_manifest(from, to);
    expect_refused(what);
  }
}

TEST_F(PackLie, ManifestsThatDisagreeWithTheHeaderAreRefused) {
  rewrite_manifest("\"experts\":3", "\"experts\":4");
  expect_refused("an expert is missing or there twice");
  rewrite_manifest("\"experts\":3", "\"experts\":2");
  expect_refused("an expert is missing or there twice");
  // the same number of experts, but of other layers
  std::string json = small_manifest().to_json();
  json.replace(json.find("\"experts\":3"), 11, "\"experts\":2");
  json.replace(json.find("\"experts\":2", json.find("\"experts\":2") + 1), 11, "\"experts\":3");
  rewrite_metadata("sluice", json);
  expect_refused("header and manifest disagree");
}

TEST_F(PackLie, MissingDuplicateAndMisnamedExpertsAreRefused) {
  const auto rename = [&](const std::string& from, const std::string& to) {
    write_pack(path_, small_manifest());
    rewrite([&](Json::Object& members) {
      for (auto& [name, value] : members) {
        if (name == from) name = to;
      }
    });
  };
  rename("layers.0.experts.1", "layers.0.experts.9");
  expect_refused("got tensor \"layers.0.experts.9\" U8");
  rename("sluice.crc32c", "sluice.crc64");
  expect_refused("got \"sluice.crc64\"");
  write_pack(path_, small_manifest());
  rewrite([&](Json::Object& members) {  // two experts change places
    std::swap(member(members, "layers.0.experts.0"), member(members, "layers.0.experts.2"));
  });
  expect_refused("got tensor \"layers.0.experts.2\"");
  write_pack(path_, small_manifest());
  rewrite([&](Json::Object& members) {
    Json::Object tensor = *member(members, "layers.0.experts.0").as_object();
    member(tensor, "dtype") = Json("I8");
    member(members, "layers.0.experts.0") = Json::object(std::move(tensor));
  });
  expect_refused("\"layers.0.experts.0\" I8");
  write_pack(path_, small_manifest());
  rewrite([&](Json::Object& members) {
    Json::Object tensor = *member(members, "sluice.crc32c").as_object();
    member(tensor, "shape") = Json(Json::Array{std::int64_t{1}, std::int64_t{5}});
    member(members, "sluice.crc32c") = Json::object(std::move(tensor));
  });
  expect_refused("expected \"sluice.crc32c\" U32 [5, 1]");
}

TEST_F(PackLie, HeadersOffTheBlockGridAreRefused) {
  rewrite([](Json::Object&) {}, 4096 + 8);
  expect_refused("expected a multiple of 4096");
}

TEST_F(PackLie, CutAndGrownFilesAreRefused) {
  const std::string whole = read_text(path_);
  for (const std::size_t bytes :
       {std::size_t{0}, std::size_t{5}, std::size_t{1000}, std::size_t{4096}, whole.size() / 2,
        whole.size() - 4096, whole.size() - 1}) {
    write_file(path_, whole.substr(0, bytes));
    expect_refused("");
  }
  write_file(path_, whole + "x");
  expect_refused("bytes trail");
}

TEST_F(PackLie, AFlippedByteIsFoundByTheReadThatBringsIt) {
  std::string text = read_text(path_);
  const SafetensorsHeader header = read_safetensors_header(path_);
  text[header.tensors[1].offset + 5000] ^= 1;
  write_file(path_, text);
  for (const Verify verify : {Verify::kFirst, Verify::kAlways}) {
    const auto store = open_pack(path_, {.chunk_bytes = 4096, .verify = verify});
    EXPECT_NO_THROW((void)read_expert(*store, make_key(0, 0)));
    EXPECT_REFUSED((void)read_expert(*store, make_key(0, 1)), CheckpointError,
                   "layer 0 expert 1: got bytes of another checksum");
    EXPECT_REFUSED((void)read_expert(*store, make_key(0, 1)), CheckpointError, path_);
  }
  const auto unverified = open_pack(path_, {.verify = Verify::kOff});
  EXPECT_NO_THROW((void)read_expert(*unverified, make_key(0, 1)));
  EXPECT_REFUSED(verify_pack(path_, {}), CheckpointError, "layer 0 expert 1");
}

TEST_F(PackLie, AWrongChecksumIsFoundByTheReadThatBringsIt) {
  std::string text = read_text(path_);
  text[text.size() - 1] ^= 1;
  write_file(path_, text);
  const auto store = open_pack(path_, ExpertStore::Options{});
  EXPECT_NO_THROW((void)read_expert(*store, make_key(1, 0)));
  EXPECT_REFUSED((void)read_expert(*store, make_key(1, 1)), CheckpointError, "layer 1 expert 1");
}

TEST_F(PackLie, DamageAfterTheFirstReadIsFoundWhenEveryReadIsVerified) {
  const auto first = open_pack(path_, {.chunk_bytes = 4096, .verify = Verify::kFirst});
  const auto always = open_pack(path_, {.chunk_bytes = 4096, .verify = Verify::kAlways});
  (void)read_expert(*first, make_key(0, 1));
  (void)read_expert(*always, make_key(0, 1));
  const std::string good = read_text(path_);
  std::string bad = good;
  bad[read_safetensors_header(path_).tensors[1].offset + 5000] ^= 1;
  const auto replace = [&](const std::string& text) {  // in place: the stores have it open
    std::fstream file(path_, std::ios::binary | std::ios::in | std::ios::out);
    file << text;
  };
  replace(bad);
  EXPECT_NO_THROW((void)read_expert(*first, make_key(0, 1)));
  EXPECT_THROW((void)read_expert(*always, make_key(0, 1)), CheckpointError);
  replace(good);
  EXPECT_NO_THROW((void)read_expert(*always, make_key(0, 1))) << "the store works on";
}

TEST_F(PackLie, VerifyReadsEverythingAndReportsProgress) {
  std::uint64_t last = 0;
  std::uint64_t total = 0;
  int calls = 0;
  verify_pack(path_, [&](std::uint64_t done, std::uint64_t all) {
    EXPECT_GT(done, last);
    last = done;
    total = all;
    ++calls;
  });
  EXPECT_EQ(calls, 5);
  EXPECT_EQ(last, total);
}

TEST_F(PackLie, OpeningReadsNoExpert) {
  testing::FaultDisk disk;
  const auto store = open_pack(path_, ExpertStore::Options{});
  EXPECT_LE(disk.reads, 3) << "length, header, checksums";
  EXPECT_EQ(store->counters().bytes_read, 0u);
}

TEST(Fingerprint, TellsTwoFineTunesApartAndIgnoresTheOrderOfShards) {
  const TempFolder folder;
  const auto shard = [&](const std::string& name, std::size_t bytes, char fill) {
    const std::string json = R"({"t":{"dtype":"U8","shape":[)" + std::to_string(bytes) +
                             R"(],"data_offsets":[0,)" + std::to_string(bytes) + "]}}";
    std::string text(8, '\0');
    for (std::size_t i = 0; i < 8; ++i) text[i] = static_cast<char>(json.size() >> (8 * i));
    write_file(folder.file(name), text + json + std::string(bytes, fill));
    return folder.file(name);
  };
  const std::vector<std::string> base = {shard("a", 100, 'a'), shard("b", 1'000'000, 'b')};
  const std::string print = fingerprint_files(base);
  EXPECT_EQ(print.size(), 64u);
  EXPECT_EQ(fingerprint_files(std::vector<std::string>{base[1], base[0]}), print);
  EXPECT_EQ(fingerprint_files(base), print);
  EXPECT_NE(fingerprint_files(std::vector<std::string>{base[0]}), print);
  EXPECT_NE(fingerprint_files(std::vector<std::string>{base[0], shard("c", 1'000'000, 'c')}),
            print);
  EXPECT_NE(fingerprint_files(std::vector<std::string>{shard("d", 100, 'd'), base[1]}), print);
  EXPECT_NE(fingerprint_files(std::vector<std::string>{base[0], shard("e", 1'000'001, 'b')}),
            print);
  write_file(folder.file("x"), "no safetensors file at all");
  EXPECT_THROW((void)fingerprint_files(std::vector<std::string>{folder.file("x")}),
               CheckpointError);
  EXPECT_THROW((void)fingerprint_files(std::vector<std::string>{folder.file("absent")}), IoError);
}

}  // namespace
}  // namespace sluice
