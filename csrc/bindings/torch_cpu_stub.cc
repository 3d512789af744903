// Empty on purpose: its SONAME alone makes the loader bind _ops to the torch in the process.
