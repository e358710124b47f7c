"""What a base consists of, from its config: no weights are read or allocated."""

import math
from dataclasses import dataclass

from llama_lora.cli import InputError
from llama_lora.model.folder.config import load_config, quantized_as, without_values
from llama_lora.model.folder.quantized_weights import QuantizedWeights, measure
from llama_lora.model.folder.tensors import StoredTensors
from llama_lora.text import brief

NF4_BYTES = 1 / 2 + (1 + 4 / 256) / 64  # 64 weights share a scale, and 256 scales share another
PLAIN_NF4_BYTES = 1 / 2 + 4 / 64  # in a folder without double quantization: scales are fp32


@dataclass(frozen=True)
class Shape:
    """A base of Llama's architecture: its linear layers, and how many other weights it has.

    `linears` are the linear layers of one decoder layer, by name, with outputs and inputs.
    """

    config: object  # of transformers
    linears: dict[str, tuple[int, int]]
    layers: int
    other: int  # weights in the compute dtype: embeddings, head, norms, biases
    head: int  # weights of the output layer, tied to the embeddings or not
    codes: QuantizedWeights | None = None  # if the folder stores some

    @property
    def linear(self) -> int:
        """Weights in the linear layers of all decoder layers."""
        return self.layers * sum(math.prod(size) for size in self.linears.values())

    @property
    def quantized(self) -> int:
        """Weights that quantization affects: those stored as codes, else all in linear layers."""
        return self.codes.weights if self.codes else self.linear

    @property
    def parameters(self) -> int:
        return self.linear + self.other

    @property
    def stored_quantized(self) -> bool:
        """Whether its folder already holds codes, so that no flag changes its precision."""
        return bool(getattr(self.config, "quantization_config", None))

    def weight_bytes(self, quantization: str, itemsize: int) -> float:
        """Bytes of the loaded weights; an unquantized one takes `itemsize`."""
        if self.codes:
            return self.codes.bytes + (self.parameters - self.codes.weights) * itemsize
        told = getattr(self.config, "quantization_config", None) or {}
        twice = told.get("bnb_4bit_use_double_quant", True)
        outputs = self.layers * sum(size[0] for size in self.linears.values())
        linear = {
            "8bit": self.linear + 4 * outputs,  # each row has a scale in fp32
            "4bit": self.linear * (NF4_BYTES if twice else PLAIN_NF4_BYTES),
            "none": self.linear * itemsize,
        }
        return linear[quantization] + self.other * itemsize

    def targets(self, names: list[str]) -> dict[str, tuple[int, int]]:
        """The linear layers of a decoder layer that `--lora_target_modules` names.

        Raises:
            InputError: a name is not one of them.
        """
        if names == ["all-linear"]:
            return self.linears
        if unknown := [name for name in names if name not in self.linears]:
            raise InputError(
                f"--lora_target_modules {unknown[0]}: no such linear layer; expected all-linear or "
                f"some of {', '.join(self.linears)}"
            )
        return {name: self.linears[name] for name in names}

    def lora_parameters(self, targets: dict[str, tuple[int, int]], r: int, dora: bool) -> int:
        """Trainable parameters: A and B of each target, and DoRA's magnitude of each output."""
        one_layer = sum(r * (out + into) + dora * out for out, into in targets.values())
        return self.layers * one_layer


def head_size(config) -> int:
    """The size of one attention head, from a config of transformers."""
    own = getattr(config, "head_dim", None)  # absent or None: the hidden size is divided up
    return own or config.hidden_size // config.num_attention_heads


def shape_of(folder) -> Shape:
    """The shape of the base in `folder`, from its config.json and its codes.

    Raises:
        InputError: there is no base, or it is not of Llama's architecture.
    """
    import torch

    config = load_config(folder)
    try:
        layers, config.num_hidden_layers = config.num_hidden_layers, 1
        model = without_values(config)
        config.num_hidden_layers = layers
        layer = model.base_model.layers[0]
    except (ValueError, KeyError, AttributeError, TypeError, ArithmeticError) as error:
        raise InputError(f"{folder}: not a base of Llama's architecture: {brief(error)}") from error
    linears = {
        name.rpartition(".")[2]: tuple(module.weight.shape)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    in_layer = sum(parameter.numel() for parameter in layer.parameters())
    outside = sum(parameter.numel() for parameter in model.parameters()) - in_layer
    rest = in_layer - sum(math.prod(size) for size in linears.values())
    head = model.get_output_embeddings().weight.numel()
    return Shape(config, linears, layers, outside + layers * rest, head, _codes(folder))


def _codes(folder) -> QuantizedWeights | None:
    precision, stored = quantized_as(folder), StoredTensors(folder)
    return measure(stored, precision) if precision and stored.headers else None
