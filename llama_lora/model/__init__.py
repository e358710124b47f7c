"""Weights, prompt template, base model, adapter and chat."""
