"""From a corpus file to micro-batches: tokens, labels, packing."""
