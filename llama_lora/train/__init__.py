"""From a corpus to an adapter."""
