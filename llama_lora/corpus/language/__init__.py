"""The language of texts, and the filter by it."""

UNKNOWN = "unknown"  # of a text too short or too mixed to tell
