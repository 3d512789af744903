"""A checkpoint on disk: which bytes are which expert, and how a store gets at them."""
