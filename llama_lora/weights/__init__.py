"""Reading and writing checkpoints: Meta's, GGUF, Hugging Face folders; merging."""
