"""Merging files, and finding what is equal or alike in them."""
