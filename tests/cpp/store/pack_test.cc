#include "store/pack.h"

#include <gtest/gtest.h>

#include "base/bytes.h"
#include "base/error.h"
#include "store/experts.h"
#include "store/safetensors.h"

namespace sluice {
namespace {

using test::canonical_expert;
using test::read_expert;
using test::seed_of;
using test::small_manifest;
using test::TempFolder;
using test::write_pack;

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
    for (std::int32_t e = 0; e < written.layers[l].num_experts; ++e) {
      EXPECT_EQ(read_expert(*store, make_key(static_cast<std::int32_t>(l), e)),
                canonical_expert(written.layers[l].layout, seed_of(l, e)));
    }
  }
  EXPECT_EQ(store->slot_bytes(LayerIdx{0}) % 4096, 0u);
  EXPECT_EQ(store->description(), "pack " + path);
}

}  // namespace
}  // namespace sluice
