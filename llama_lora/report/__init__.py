"""Looking at a corpus: what is in a file, how it came about, and what training makes of it."""
