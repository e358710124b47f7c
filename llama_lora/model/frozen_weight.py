"""The weight of a frozen linear layer, in whatever precision it is stored."""

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from llama_lora.model.int8_linear import Int8Linear, dequantized


def is_known(layer: torch.nn.Module) -> bool:
    """Whether `dense` knows the weight of a layer."""
    return type(layer) in (torch.nn.Linear, Int8Linear, Linear4bit)


def dense(layer: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in `dtype`; of 8 bits on a CPU until the next one is asked for."""
    if isinstance(layer, Int8Linear):
        return dequantized(layer.weight.data, layer.steps, dtype)
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    return layer.weight.to(dtype)
