"""Training: speed, memory, what it teaches, beside other recipes."""
