"""Looking at a corpus: what is in a file, how it was made, and what training makes of it."""
