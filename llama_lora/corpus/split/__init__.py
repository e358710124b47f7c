"""Cutting conversations into pieces that fit a window of tokens."""
