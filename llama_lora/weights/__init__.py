"""Checkpoints of every kind read and written: Meta, GGUF, Hugging Face folders; merging."""
