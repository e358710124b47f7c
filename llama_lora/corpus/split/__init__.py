"""Cutting conversations to a window, counted in tokens."""
