# What every build of _core has; devices.cc and device_rates.cc have twins.
set(SLUICE_BINDINGS_SOURCES
    device_bandwidth.cc
    errors.cc
    kernels.cc
    module.cc
    pack.cc
    registry.cc
    scorers.cc
    session.cc
    session_state.cc
    simulate.cc
    store.cc
    torch_bridge.cc
    views.cc)
list(TRANSFORM SLUICE_BINDINGS_SOURCES PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
# Half of what these compile: once for all.
set(SLUICE_BINDINGS_HEADERS <pybind11/pybind11.h> <pybind11/stl.h>)
