"""Merging files, and finding equal and similar conversations in them."""
