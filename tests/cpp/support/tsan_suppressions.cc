// Linked into every test of a thread-sanitizer build. An exception's reference count lives in
// libstdc++.so, which is not instrumented: the sanitizer sees one thread read an exception and
// another free it, and not the count between them.
// The runtime is a shared library: it finds the function only if it is visible.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_suppressions() {
  return "race:std::__exception_ptr::exception_ptr::_M_release\n"
         "race:__cxa_end_catch\n";
}
