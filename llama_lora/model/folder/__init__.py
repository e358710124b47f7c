"""What lies in the folder of a model: config, tensors, codes of quantized weights."""
