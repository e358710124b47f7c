"""A few of a base's weights, kept with its adapter: they tell bases of one shape apart.

A name is not enough: of two folders called ./base, one may be a fine-tune of the other.
"""

import json
import random
from pathlib import Path

from llama_lora.hardware.device import dtype_name
from llama_lora.model.folder.tensors import FLOATS, StoredTensors

KEY = "base_values"  # in the metadata of a safetensors file, which other readers ignore
LAYERS, VALUES = 8, 8  # from so many layers, so many values, the first of each weight
ROUNDING = 2**-7  # tolerance for a value stored as bfloat16 here and as float16 there
SMALL = 1e-7  # the same, for values near zero


def keep(weights: Path, layers: list[str], base: Path) -> None:
    """Write a few values of the base's weights in some of those layers into the file `weights`."""
    from safetensors.torch import load_file, save_file

    chosen = random.Random(0).sample(sorted(layers), min(LAYERS, len(layers)))
    values = _read(base, chosen)
    partial = weights.with_suffix(".partial")  # the loaded tensors still share the file's memory
    save_file(load_file(weights), partial, {"format": "pt", KEY: json.dumps(values)})
    partial.replace(weights)


def same(weights: Path, base: Path) -> bool | None:
    """Whether `base` has the values kept in `weights`; None if there are none to compare.

    Values in the other 16-bit dtype also count as the same.
    """
    import torch
    from safetensors import safe_open

    if not weights.is_file():
        return None
    with safe_open(weights, framework="pt") as file:
        kept = json.loads((file.metadata() or {}).get(KEY, "{}"))
    found = _read(base, list(kept))
    pairs = [(torch.tensor(kept[layer]), torch.tensor(found[layer])) for layer in found]
    if not pairs:
        return None
    return all(torch.allclose(was, now, rtol=ROUNDING, atol=SMALL) for was, now in pairs)


def _read(base: Path, layers: list[str]) -> dict[str, list[float]]:
    """Values by layer, without layers that `base` lacks or holds quantized."""
    stored = StoredTensors(base)
    names = {layer: stored.name_of(f"{layer}.weight") for layer in layers}
    weights = {layer: stored.load(name) for layer, name in names.items() if name}
    return {
        layer: weight[0, :VALUES].float().tolist()
        for layer, weight in weights.items()
        if dtype_name(weight.dtype) in FLOATS
    }
