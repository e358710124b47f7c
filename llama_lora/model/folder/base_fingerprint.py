"""A few of its base's weights, kept with an adapter: what tells bases of one shape apart.

A name does not: of two folders called ./base, one may be a fine-tune of the other.
"""

import json
import random
from pathlib import Path

from llama_lora.hardware.device import dtype_name
from llama_lora.model.folder.tensors import FLOATS, StoredTensors

KEY = "base_values"  # in the metadata of a safetensors file, which other readers ignore
LAYERS, VALUES = 8, 8  # of so many layers so many values, the first of the weight
ROUNDING = 2**-7  # what a value may be off that is stored in bfloat16 here and in float16 there
SMALL = 1e-7  # the same for what is near zero


def keep(weights: Path, layers: list[str], base: Path) -> None:
    """Write values of the base's weights of some of those layers into an adapter's `weights`."""
    from safetensors.torch import load_file, save_file

    chosen = random.Random(0).sample(sorted(layers), min(LAYERS, len(layers)))
    values = _read(base, chosen)
    partial = weights.with_suffix(".partial")  # what is loaded is still the file's own memory
    save_file(load_file(weights), partial, {"format": "pt", KEY: json.dumps(values)})
    partial.replace(weights)


def same(weights: Path, base: Path) -> bool | None:
    """Whether `base` has the values that are kept in `weights`; None without any to compare.

    It has them in another 16 bits, too.
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
    """By layer; without those that `base` has not, or quantized."""
    stored = StoredTensors(base)
    names = {layer: stored.name_of(f"{layer}.weight") for layer in layers}
    weights = {layer: stored.load(name) for layer, name in names.items() if name}
    return {
        layer: weight[0, :VALUES].float().tolist()
        for layer, weight in weights.items()
        if dtype_name(weight.dtype) in FLOATS
    }
