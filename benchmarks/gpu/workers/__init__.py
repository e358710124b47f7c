"""The processes that measure, and what they need."""
