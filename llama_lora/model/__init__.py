"""Base model, adapter, prompt template, and labels."""
