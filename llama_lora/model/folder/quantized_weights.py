"""Weights that a folder stores as bitsandbytes' codes, and what is needed to read them."""

from dataclasses import dataclass
from pathlib import Path

from llama_lora.cli import InputError
from llama_lora.model.folder.tensors import StoredTensors
from llama_lora.text import named

# What bitsandbytes stores with the codes of a weight: tensors named after the layer, plus this.
SCALES = ".SCB"
STATES = ".weight.quant_state.bitsandbytes__"  # and "nf4" or "fp4"
ENDINGS = {"8bit": SCALES, "4bit": STATES}


@dataclass(frozen=True)
class QuantizedWeights:
    """How many weights a folder stores as codes, and how many bytes they and their scales take."""

    weights: int
    bytes: int


def precision_of(stored: StoredTensors) -> str | None:
    """ "8bit" or "4bit" if some weights are stored as codes, else None."""
    return next((precision for precision in ENDINGS if layers(stored, precision)), None)


def layers(stored: StoredTensors, precision: str) -> set[str]:
    """The layers with something stored to read their codes with."""
    ending = ENDINGS[precision]
    return {name.partition(ending)[0] for name in stored.headers if ending in name}


def measure(stored: StoredTensors, precision: str) -> QuantizedWeights:
    """How many weights are stored as codes, and in how many bytes."""
    readable = layers(stored, precision)
    parts = {
        name: tensor
        for name, tensor in stored.headers.items()
        if name.partition(".weight")[0].removesuffix(SCALES) in readable
    }
    a_byte = {"8bit": 1, "4bit": 2}[precision]
    codes = sum(parts[f"{layer}.weight"].nbytes for layer in readable)
    return QuantizedWeights(codes * a_byte, sum(tensor.nbytes for tensor in parts.values()))


def check(folder: Path, stored: StoredTensors, precision: str) -> None:
    """Check that there are weights in codes, and that each has what is needed to read it.

    A folder without weights is not checked: it is enough for a memory plan.

    Raises:
        InputError: a tensor is missing, or no weight is in codes.
    """
    import torch

    code = {"8bit": torch.int8, "4bit": torch.uint8}[precision]
    in_codes = {
        name.removesuffix(".weight")
        for name, tensor in stored.headers.items()
        if tensor.dtype == code and name.endswith(".weight")
    }
    readable = layers(stored, precision)
    if stored.headers and not in_codes | readable:
        raise InputError(
            f"{folder}: config.json says that the weights are quantized with bitsandbytes, but "
            'none is: remove "quantization_config" from it'
        )
    parts = {f"{layer}.weight" for layer in readable}
    if precision == "4bit":
        parts |= {f"{weight}.{part}" for weight in parts for part in ("absmax", "quant_map")}
        # Double quantization: the scales are codes themselves.
        parts |= {
            name.removesuffix("absmax") + part
            for name in parts & stored.headers.keys()
            if name.endswith(".absmax") and stored.headers[name].dtype == torch.uint8
            for part in ("nested_absmax", "nested_quant_map")
        }
    lacking = parts - stored.headers.keys()
    lacking |= {
        layer + ENDINGS[precision] + "nf4" * (precision == "4bit") for layer in in_codes - readable
    }
    if lacking:
        raise InputError(f"{folder}: expected {named(lacking)}, found none")


def misshapen(model) -> set[tuple[str, tuple, tuple]]:
    """Quantized weights whose shape does not fit the loaded `model`.

    Each with its stored and its expected shape; transformers compares the shapes of all others.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit

    found = set()
    for name, layer in model.named_modules():
        if isinstance(layer, (Linear4bit, Linear8bitLt)):
            weight, expected = layer.weight, (layer.out_features, layer.in_features)
            packed = isinstance(weight, Params4bit)
            shape = tuple(weight.quant_state.shape if packed else weight.shape)
            if shape != expected:
                found.add((f"{name}.weight", shape, expected))
    return found
