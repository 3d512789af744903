#pragma once

#include <memory>

#include "store/reader_pool.h"
#include "transfer/link.h"

namespace sluice {

/// The disk as a link: a reader pool whose threads report landings. Depth = its threads.
///
/// `device`: whose copies read what is written here (the host tier). A reader waits for the last
/// one of them, `last_use`, before its first write (I2). Null: slots of a host device, whose reader
/// has returned before its lease ended.
[[nodiscard]] std::unique_ptr<Link> make_disk_link(std::shared_ptr<const ExpertStore> store,
                                                   int io_threads, Device* device = nullptr);

}  // namespace sluice
