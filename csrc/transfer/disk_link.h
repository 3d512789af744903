#pragma once

#include <memory>

#include "store/reader_pool.h"
#include "transfer/link.h"

namespace sluice {

/// The disk as a link: a reader pool whose threads report landings. Depth = its threads.
[[nodiscard]] std::unique_ptr<Link> make_disk_link(std::shared_ptr<const ExpertStore> store,
                                                   int io_threads);

}  // namespace sluice
