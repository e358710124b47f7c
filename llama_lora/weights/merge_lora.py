"""Merges a base and its adapter into one model, one tensor at a time.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024).
"""

import dataclasses
import json
import math
from pathlib import Path

import torch

from llama_lora.cli import InputError
from llama_lora.hardware.device import dtype_name
from llama_lora.model import adapter, model_card
from llama_lora.model.folder import older_libraries
from llama_lora.model.folder.config import EMBEDDINGS, HEAD, embedding_rows
from llama_lora.model.template import has_tokenizer, load_template
from llama_lora.weights import gguf_writer
from llama_lora.weights.hf_reader import FolderWeights
from llama_lora.weights.hf_writer import (
    Checkpoint,
    WrittenFolder,
    building,
    plan_shards,
    write_weights,
)

CHUNK = 1 << 24  # weights computed at a time, in float32

# The ways of initializing A and B that leave the base's own weights alone.
STARTS = (True, False, "gaussian", "orthogonal", "eva")
UNSUPPORTED = ("lora_bias", "use_qalora", "layer_replication", "fan_in_fan_out")


@dataclasses.dataclass(frozen=True)
class LayerDelta:
    """What an adapter makes of the weight W of a linear layer: W + scale·B·A.

    With DoRA, each row is then stretched to the length in `magnitude`.

    Attributes:
        a, b: float32, of shapes (rank, in) and (out, rank).
        magnitude: float32, of shape (out,); None without DoRA.
        weight: W, if the adapter holds it itself, as peft's may for an output layer.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None
    weight: torch.Tensor | None

    def applied(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The merged weight, of shape (out, in), computed in float32 some rows at a time."""
        merged = torch.empty(weight.shape, dtype=dtype)
        step = max(CHUNK // weight.shape[1], 1)
        for start in range(0, len(weight), step):
            part = slice(start, start + step)
            rows = torch.addmm(weight[part].float(), self.b[part], self.a, alpha=self.scale)
            if self.magnitude is not None:
                rows *= (self.magnitude[part] / torch.linalg.norm(rows, dim=1))[:, None]
            merged[part] = rows
        return merged


def merge(
    base: Path,
    lora: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    kinds: tuple[str, ...] = (),
    overwrite: bool = False,
) -> WrittenFolder:
    """Write the base in `base`, merged with the adapter in `lora`, as a model folder of its own.

    Memory holds one output shard besides the adapter. An adapter trained on a quantized base is
    merged into the base's 16-bit weights.

    Args:
        target: the folder; it appears when everything in it is complete, or not at all.
        dtype: of the weights; if None, as the base's are stored (float32 as float16).
        max_shard_size: bytes in one safetensors file.
        kinds: GGUF files to write beside them, such as "F16" and "Q8_0".

    Raises:
        InputError: the adapter was made for another base, or cannot be merged; the base is
            quantized; the target is taken, or the disk is too small.
    """
    for source in (base, lora):
        if target.resolve() == source.resolve():
            raise InputError(f"{target}: expected a folder other than {source}")
    merged, shapes = open_merged(base, lora, dtype)
    if kinds:
        gguf_writer.check(base, merged.config, merged.tokenizer, shapes)
    sizes = {name: math.prod(shape) * merged.dtype.itemsize for name, shape in shapes.items()}
    total, name = sum(sizes.values()), target.resolve().name
    needed = total + sum(gguf_writer.size(shapes, kind) for kind in kinds)
    with building(target, overwrite, needed) as folder:
        _write_configs(folder, merged, base)
        files = write_weights(folder, merged, merged.dtype, plan_shards(sizes, max_shard_size))
        for kind in kinds:
            gguf_writer.write(folder, folder / f"{name}-{kind}.gguf", kind)
        model_card.write_merged(folder, name, base, lora, dtype_name(merged.dtype))
    return WrittenFolder(total // merged.dtype.itemsize, total, files, merged.dtype)


def open_merged(
    base: Path, lora: Path, dtype: torch.dtype | None
) -> tuple[Checkpoint, dict[str, tuple[int, ...]]]:
    """The merged model, whose tensors are computed when loaded, and their shapes by name."""
    weights = FolderWeights(base)
    changes = read_deltas(lora, weights.model)
    template = load_template(lora if has_tokenizer(lora) else base)
    dtype, config, shapes = dtype or weights.dtype, weights.config, dict(weights.shapes)
    if HEAD.removesuffix(".weight") in changes and HEAD not in shapes:
        # A changed output layer can no longer be the embeddings.
        config.tie_word_embeddings, shapes[HEAD] = False, shapes[EMBEDDINGS]

    def load(name: str) -> torch.Tensor:
        change = changes.get(name.removesuffix(".weight"))
        if change and change.weight is not None:
            return change.applied(change.weight, dtype)
        stored = weights.load(name if name in weights.shapes else EMBEDDINGS)
        return change.applied(stored, dtype) if change else stored

    checkpoint = Checkpoint(base, config, template.tokenizer, template.stop_ids, dtype, load)
    return checkpoint, shapes


def read_deltas(folder: Path, model) -> dict[str, LayerDelta]:
    """What the adapter in `folder` changes, by the name of the linear layer.

    Args:
        model: the base it has to fit; may be on the meta device.

    Raises:
        InputError: the adapter is damaged, for another base, or of a kind that cannot be merged.
    """
    tensors = adapter.read_weights(folder)
    config = adapter.read_config(folder)
    _check_kind(folder, config)
    adapter.check_fits(folder, tensors, model)
    changes = {}
    for key in [key for key in tensors if adapter.LORA_A.fullmatch(key)]:
        layer = adapter.LORA_A.fullmatch(key)[1]
        prefix = key.removesuffix("lora_A.weight")
        a, b = tensors.pop(key).float(), tensors.pop(prefix + "lora_B.weight").float()
        magnitude = None
        if config.use_dora:
            magnitude = tensors.pop(prefix + "lora_magnitude_vector", None)
            if magnitude is None or magnitude.shape != b.shape[:1]:
                raise InputError(f"{folder}: expected DoRA's {len(b)} magnitudes of {layer}")
            magnitude = magnitude.float()
        weight = tensors.pop(prefix + "base_layer.weight", None)
        if weight is not None and weight.shape != (len(b), a.shape[1]):
            raise InputError(f"{folder}: expected the weight of {layer} to fit its matrices")
        changes[layer] = LayerDelta(a, b, _scale(folder, config, layer, len(a)), magnitude, weight)
    if tensors:
        raise InputError(
            f"{folder}: expected matrices of linear layers alone, found {min(tensors)}, which "
            "cannot be merged"
        )
    return changes


def _check_kind(folder: Path, config) -> None:
    """Refuse an adapter that computes differently from LoRA and DoRA, or changes the base."""
    variants = [
        field.name
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and field.name != "use_dora"
    ]
    found = [name for name in (*variants, *UNSUPPORTED) if getattr(config, name, None)]
    if config.init_lora_weights not in STARTS:
        found.append(f"init_lora_weights {config.init_lora_weights!r}")
    if found:
        raise InputError(f"{folder}: expected LoRA, rsLoRA or DoRA, found {', '.join(found)}")


def _scale(folder: Path, config, layer: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    def of(patterns: dict, usual: int) -> int:
        return patterns.get(get_pattern_key(patterns.keys(), layer), usual)

    expected = of(config.rank_pattern, config.r)
    if rank != expected:
        raise InputError(f"{folder}: expected rank {expected} of {layer}, found {rank}")
    alpha = of(config.alpha_pattern, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _write_configs(folder: Path, merged: Checkpoint, base: Path) -> None:
    merged.config.dtype = merged.dtype
    merged.config.save_pretrained(folder)
    merged.tokenizer.save_pretrained(folder)
    older_libraries.amend(folder, base)
    # Not through GenerationConfig, which refuses to save some existing ones: those of Vicuna and
    # Llama 2 set a temperature without do_sample.
    path = base / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stored = settings.get("eos_token_id")
    stops = stored if isinstance(stored, list) else [] if stored is None else [stored]
    settings["eos_token_id"] = sorted({*stops, *merged.stop_ids})
    for role in ("bos", "pad"):
        id = getattr(merged.tokenizer, f"{role}_token_id")
        if id is None or id < embedding_rows(merged.config):
            settings.setdefault(f"{role}_token_id", id)
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
