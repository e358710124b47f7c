"""Base model, adapter, prompt template, and the hardware that they run on."""
