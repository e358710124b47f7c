"""What a model folder holds: config, tensors, quantized weights."""
