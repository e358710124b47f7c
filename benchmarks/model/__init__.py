"""The base and its adapter: rounding, merging, the first token."""
