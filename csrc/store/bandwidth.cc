#include "store/bandwidth.h"

#include <atomic>
#include <chrono>
#include <exception>
#include <thread>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "base/mutex.h"
#include "store/file.h"
#include "store/io_scratch.h"

namespace sluice {
namespace {

struct Read {
  std::uint64_t offset = 0;
  std::size_t bytes = 0;
  std::size_t needed = 0;
};

std::vector<Read> cut(std::span<const FileExtent> extents, std::size_t chunk_bytes,
                      const ReadFile& file) {
  std::vector<Read> reads;
  for (const FileExtent& extent : extents) {
    const auto end = checked_add(extent.offset, extent.bytes);
    require<ConfigError>(end.has_value() && *end <= file.bytes(), [&] {
      return file.path() + ": got a range of " + std::to_string(extent.bytes) + " bytes at " +
             std::to_string(extent.offset) + ", expected one within its " +
             std::to_string(file.bytes());
    });
    const std::uint64_t last = align_up(*end, kDirectAlignment);
    for (std::uint64_t at = align_down(extent.offset, kDirectAlignment); at < last;
         at += chunk_bytes) {
      const std::uint64_t bytes = std::min<std::uint64_t>(chunk_bytes, last - at);
      const std::uint64_t needed = std::min(bytes, file.bytes() - at);
      reads.push_back({at, bytes, needed});
    }
  }
  return reads;
}

}  // namespace

double disk_bandwidth(const std::string& path, std::span<const FileExtent> extents,
                      std::size_t chunk_bytes, int threads) {
  require<ConfigError>(
      chunk_bytes > 0 && chunk_bytes % kDirectAlignment == 0 && threads >= 1 && threads <= 64, [&] {
        return "disk_bandwidth: got chunks of " + std::to_string(chunk_bytes) + " bytes on " +
               std::to_string(threads) + " threads, expected a multiple of 4096 and 1 to 64";
      });
  const ReadFile file(path);
  if (!file.is_direct()) {
    throw IoError("disk_bandwidth: O_DIRECT is refused here, expected a file on a disk", path, 0,
                  0);
  }
  const std::vector<Read> reads = cut(extents, chunk_bytes, file);
  require<ConfigError>(!reads.empty(), [&] {
    return path + ": disk_bandwidth: got no bytes to read, expected some";
  });

  std::vector<IoScratch> scratches;
  for (int i = 0; i < threads; ++i) scratches.emplace_back(chunk_bytes);
  std::atomic<std::size_t> next{0};
  std::atomic<std::uint64_t> total{0};
  std::exception_ptr error;
  Mutex error_mu;
  const auto begin = std::chrono::steady_clock::now();
  {
    std::vector<std::jthread> workers;
    for (IoScratch& scratch : scratches) {
      workers.emplace_back([&] {
        ReadFile::Cost cost;
        try {
          for (std::size_t i = next.fetch_add(1); i < reads.size(); i = next.fetch_add(1)) {
            file.read_aligned(reads[i].offset, reads[i].bytes, reads[i].needed,
                              scratch.reserve(chunk_bytes), cost);
          }
        } catch (...) {
          const MutexLock lock(error_mu);
          error = std::current_exception();
        }
        total.fetch_add(cost.bytes);
      });
    }
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
  if (error) std::rethrow_exception(error);
  return static_cast<double>(total.load()) / elapsed.count();
}

double disk_bandwidth(const std::string& path, std::uint64_t offset, std::uint64_t bytes,
                      std::size_t chunk_bytes, int threads) {
  const FileExtent extent{offset, bytes};
  return disk_bandwidth(path, std::span(&extent, 1), chunk_bytes, threads);
}

}  // namespace sluice
