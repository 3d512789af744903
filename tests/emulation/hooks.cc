// Behind `-fsanitize=thread`: g++ puts a call in front of every load and store of a kernel, and
// these answer it instead of libtsan, which is not linked. They are called by whatever of a .cu
// file the linker keeps, host code too (inline functions of the standard library), so each returns
// at once where no kernel runs, or where another thread runs it.
//
// Source of the interface: GCC 12, gcc/sanitizer.def and libsanitizer/tsan/tsan_interface.h.

#include <string>

#include "tests/emulation/block.h"
#include "tests/emulation/checks.h"
#include "tests/emulation/faults.h"

namespace simt {

bool checked() { return true; }

namespace {

template <std::size_t kBytes, Access kAccess>
void aligned(const void* address) {
  if (current == nullptr || !on_device_thread()) return;
  if (reinterpret_cast<std::uintptr_t>(address) % kBytes != 0) {
    fail([&] {
      return "misaligned access: got " + describe_for_kernel(address) + ", expected " +
             std::to_string(kBytes) + "-byte alignment for " + std::to_string(kBytes) + " bytes";
    });
  }
  check_access(address, kBytes, kAccess);
}

void unaligned(const void* address, std::size_t bytes, Access access) {
  if (current != nullptr && on_device_thread() && bytes > 0) check_access(address, bytes, access);
}

}  // namespace
}  // namespace simt

extern "C" {

#define SIMT_ACCESS_HOOKS(n)                                                                      \
  void __tsan_read##n(void* p) { simt::aligned<n, simt::Access::kRead>(p); }                      \
  void __tsan_write##n(void* p) { simt::aligned<n, simt::Access::kWrite>(p); }                    \
  void __tsan_volatile_read##n(void* p) { simt::aligned<n, simt::Access::kRead>(p); }             \
  void __tsan_volatile_write##n(void* p) { simt::aligned<n, simt::Access::kWrite>(p); }           \
  void __tsan_unaligned_read##n(void* p) { simt::unaligned(p, n, simt::Access::kRead); }          \
  void __tsan_unaligned_write##n(void* p) { simt::unaligned(p, n, simt::Access::kWrite); }        \
  void __tsan_unaligned_volatile_read##n(void* p) { simt::unaligned(p, n, simt::Access::kRead); } \
  void __tsan_unaligned_volatile_write##n(void* p) { simt::unaligned(p, n, simt::Access::kWrite); }
SIMT_ACCESS_HOOKS(1)
SIMT_ACCESS_HOOKS(2)
SIMT_ACCESS_HOOKS(4)
SIMT_ACCESS_HOOKS(8)
SIMT_ACCESS_HOOKS(16)
#undef SIMT_ACCESS_HOOKS

void __tsan_read_range(void* p, std::size_t bytes) {
  simt::unaligned(p, bytes, simt::Access::kRead);
}
void __tsan_write_range(void* p, std::size_t bytes) {
  simt::unaligned(p, bytes, simt::Access::kWrite);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// std::shared_ptr and the like in host code of a .cu; kernels use atomicAdd and its relatives.
#define SIMT_ATOMIC_HOOKS(bits, T)                                                                \
  T __tsan_atomic##bits##_load(const volatile T* p, int) {                                        \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                  \
  }                                                                                               \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) {                                     \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                               \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                                     \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                           \
  }                                                                                               \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) {                                    \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                            \
  }                                                                                               \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) {                                    \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                            \
  }                                                                                               \
  T __tsan_atomic##bits##_fetch_and(volatile T* p, T v, int) {                                    \
    return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);                                            \
  }                                                                                               \
  T __tsan_atomic##bits##_fetch_or(volatile T* p, T v, int) {                                     \
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {  \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) \
               ? 1                                                                                \
               : 0;                                                                               \
  }                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {    \
    return __tsan_atomic##bits##_compare_exchange_strong(p, expected, v, 0, 0);                   \
  }
SIMT_ATOMIC_HOOKS(8, std::uint8_t)
SIMT_ATOMIC_HOOKS(16, std::uint16_t)
SIMT_ATOMIC_HOOKS(32, std::uint32_t)
SIMT_ATOMIC_HOOKS(64, std::uint64_t)
#undef SIMT_ATOMIC_HOOKS

void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"
