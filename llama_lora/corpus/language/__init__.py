"""Detecting the language of texts, and filtering by it."""

UNKNOWN = "unknown"  # of a text too short or too mixed to tell
