"""Base model, adapter, and prompt template."""
