#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <string_view>

namespace sluice::bindings {

/// Text for a person, whatever bytes are in it: a path or a cut name need not be UTF-8.
[[nodiscard]] pybind11::str text_of(std::string_view text);

/// Sets the Python error that `error` stands for: the class of the same name, with its attributes;
/// a Python exception that passed through C++ comes back as it was, traceback included.
/// Requires the GIL.
void set_python_error(const std::exception_ptr& error);

/// The same as an object, traceback attached. Requires the GIL.
[[nodiscard]] pybind11::object to_python_exception(const std::exception_ptr& error);

}  // namespace sluice::bindings
