#include "bindings/errors.h"

#include <string>

#include "base/error.h"
#include "bindings/bindings.h"

namespace sluice::bindings {
namespace {

/// The classes, made once and kept for the life of the process: errors may be raised at its end.
struct Classes {
  PyObject* base = nullptr;
  PyObject* config = nullptr;
  PyObject* checkpoint = nullptr;
  PyObject* io = nullptr;
  PyObject* capacity = nullptr;
  PyObject* device = nullptr;
  PyObject* internal = nullptr;
} classes;

PyObject* make_class(py::module_& m, const char* name, const char* doc, PyObject* second_parent) {
  py::object bases = py::reinterpret_borrow<py::object>(PyExc_Exception);
  if (classes.base != nullptr) {
    bases = py::make_tuple(py::handle(classes.base), py::handle(second_parent));
  }
  const std::string full_name = std::string("sluice.errors.") + name;  // as tracebacks print it
  PyObject* made = PyErr_NewExceptionWithDoc(full_name.c_str(), doc, bases.ptr(), nullptr);
  if (made == nullptr) throw py::error_already_set();
  m.attr(name) = py::handle(made);
  return made;
}

void set_error(PyObject* raised_class, const char* what) {
  PyErr_SetObject(raised_class, text_of(what).ptr());
}

void set_io_error(const IoError& error) {
  const py::object raised = py::reinterpret_borrow<py::object>(classes.io)(text_of(error.what()));
  raised.attr("errno") = error.error_number() == 0 ? py::object(py::none())
                                                   : py::object(py::int_(error.error_number()));
  raised.attr("path") =
      py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.path().c_str()));
  raised.attr("offset") = error.offset();
  PyErr_SetObject(classes.io, raised.ptr());
}

/// Rethrows `error`; true when it was one of ours and the Python error is set.
bool try_set(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (py::error_already_set& python_error) {
    python_error.restore();
  } catch (const ConfigError& e) {
    set_error(classes.config, e.what());
  } catch (const CheckpointError& e) {
    set_error(classes.checkpoint, e.what());
  } catch (const IoError& e) {
    set_io_error(e);
  } catch (const CapacityError& e) {
    set_error(classes.capacity, e.what());
  } catch (const DeviceError& e) {
    set_error(classes.device, e.what());
  } catch (const InternalError& e) {
    set_error(classes.internal, e.what());
  } catch (const Interrupted&) {
    PyErr_SetNone(PyExc_KeyboardInterrupt);
  } catch (const Error& e) {
    set_error(classes.base, e.what());
  } catch (...) {
    return false;
  }
  return true;
}

}  // namespace

py::str text_of(std::string_view text) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "backslashreplace"));
}

void set_python_error(const std::exception_ptr& error) {
  if (try_set(error)) return;
  try {
    std::rethrow_exception(error);
  } catch (const std::bad_alloc&) {
    PyErr_SetString(PyExc_MemoryError, "sluice: an allocation was refused");
  } catch (const std::exception& e) {
    set_error(classes.internal, e.what());
  } catch (...) {
    set_error(classes.internal, "sluice: an exception of an unknown type");
  }
}

py::object to_python_exception(const std::exception_ptr& error) {
  set_python_error(error);
  py::error_already_set fetched;
  if (fetched.trace()) PyException_SetTraceback(fetched.value().ptr(), fetched.trace().ptr());
  return fetched.value();
}

void bind_errors(py::module_& m) {
  classes.base = make_class(m, "SluiceError", "Anything sluice raises on purpose.", nullptr);
  classes.config = make_class(m, "ConfigError", "A setting that can never work.", PyExc_ValueError);
  classes.checkpoint =
      make_class(m, "CheckpointError", "A malformed file, a missing tensor, a hash that differs.",
                 PyExc_ValueError);
  classes.io = make_class(m, "IoError", "A file operation failed; has errno, path and offset.",
                          PyExc_OSError);
  classes.capacity = make_class(m, "CapacityError", "The working set cannot fit into the memory.",
                                PyExc_MemoryError);
  classes.device =
      make_class(m, "DeviceError", "A call to an accelerator failed.", PyExc_RuntimeError);
  classes.internal =
      make_class(m, "InternalError", "An invariant broke: a bug of sluice.", PyExc_AssertionError);
  py::register_local_exception_translator([](std::exception_ptr error) {
    if (error && !try_set(error)) std::rethrow_exception(error);
  });
}

}  // namespace sluice::bindings
