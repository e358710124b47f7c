"""What was found, kept on disk and written as a page."""
