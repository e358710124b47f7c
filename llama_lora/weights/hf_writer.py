"""The Hugging Face side of a conversion: names and shapes of parameters, and writing a folder."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from llama_lora.cli import InputError
from llama_lora.hardware.device import dtype_name
from llama_lora.model.folder import older_libraries

MODULES = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
]


@dataclass(frozen=True)
class Checkpoint:
    """A Llama checkpoint opened for reading, in Hugging Face terms.

    Attributes:
        source: the file or folder it came from, for messages.
        config: shapes and rotary parameters; the token ids are the tokenizer's.
        stop_ids: the tokens that end a generated answer.
        dtype: the 16-bit dtype that best keeps the stored values (what `--dtype auto` means).
        load: parameter name -> its whole tensor, in at least the stored precision. It is called
            once for each name of `parameter_shapes(config)`, in that order.
    """

    source: Path
    config: LlamaConfig
    tokenizer: PreTrainedTokenizerFast
    stop_ids: list[int]
    dtype: torch.dtype
    load: Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class WrittenFolder:
    """What a conversion wrote."""

    parameters: int
    bytes: int
    files: int
    dtype: torch.dtype


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter of a `LlamaForCausalLM`, layer by layer."""
    dim, hidden = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    of_layer = dict(
        zip(
            MODULES,
            [(queries, dim), (keys, dim), (keys, dim), (dim, queries)]
            + [(hidden, dim), (hidden, dim), (dim, hidden), (dim,), (dim,)],
            strict=True,
        )
    )
    shapes = {"model.embed_tokens.weight": (config.vocab_size, dim)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": of_layer[name] for name in MODULES}
    shapes["model.norm.weight"] = (dim,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, dim)
    return shapes


def split_rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection from Meta's rotary layout to Hugging Face's.

    Meta (and GGUF) rotate neighbours, as the complex numbers (x0 + i·x1, x2 + i·x3, …) of a head;
    Hugging Face rotates the halves of a head against each other. Shape (heads·head_dim, dim) stays.
    """
    rows, dim = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, dim)
    return pairs.transpose(1, 2).reshape(rows, dim)


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a `target` that must not be replaced or cannot become a folder.

    Raises:
        InputError: it is a file; or it is not empty, and `overwrite` is not given or it does not
            hold a model.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: expected a folder or nothing, found a file")
    if not any(target.iterdir()):
        return
    if not (target / "config.json").exists():
        raise InputError(
            f"{target}: the folder is not empty and does not hold a model; choose another"
        )
    if not overwrite:
        raise InputError(f"{target}: already holds a model; --overwrite replaces it")


def write_folder(
    checkpoint: Checkpoint,
    target: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 2 * 10**9,
    overwrite: bool = False,
) -> WrittenFolder:
    """Write `checkpoint` as a folder for `from_pretrained`; memory holds one shard at a time.

    Args:
        target: the folder; it appears once everything in it is complete, or not at all.
        dtype: of the weights; `checkpoint.dtype` if None.
        max_shard_size: bytes in one safetensors file (a larger tensor gets its own file).
        overwrite: whether a model in `target` may be replaced.

    Raises:
        InputError: the target is taken, the disk is too small, or a weight does not fit `dtype`.
    """
    dtype = dtype or checkpoint.dtype
    sizes = {
        name: math.prod(shape) * dtype.itemsize
        for name, shape in parameter_shapes(checkpoint.config).items()
    }
    with building(target, overwrite, sum(sizes.values())) as folder:
        _write_configs(folder, checkpoint, dtype)
        checkpoint.tokenizer.save_pretrained(folder)
        older_libraries.amend(folder)
        files = write_weights(folder, checkpoint, dtype, plan_shards(sizes, max_shard_size))
    total = sum(sizes.values())
    return WrittenFolder(total // dtype.itemsize, total, files, dtype)


@contextmanager
def building(target: Path, overwrite: bool, size: int) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `target` on success and vanishes on any failure.

    It is in the nearest existing folder above `target`, so that a failure leaves no new parents
    either. A killed run leaves it behind; the next run to the same target removes it.
    """
    target = target.resolve()
    check_target(target, overwrite)
    parent = next(folder for folder in target.parents if folder.exists())
    partial = parent / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(parent).free
        if free < size:
            raise InputError(
                f"{target}: needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free"
            )
        partial.mkdir()
        yield partial
        _move_into_place(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise InputError(f"{target}: could not be written: {error}") from error
        raise


def _move_into_place(partial: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def plan_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Cut the parameters, in order, into runs of at most `limit` bytes (or one parameter)."""
    shards, used = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_weights(
    folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, shards: list[list[str]]
) -> int:
    """Write the safetensors files and, if there are several, their index; returns their number."""
    weight_map, total = {}, 0
    count = sum(map(len, shards))
    with tqdm(desc="weights", total=count, unit="tensor", leave=False, disable=None) as progress:
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = _cast(checkpoint, name, dtype)
                total += tensors[name].nbytes
                progress.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
            # safetensors makes files that only their owner may read.
            shutil.copymode(folder / "config.json", folder / file)
            weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return len(shards)


def _cast(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    tensor = checkpoint.load(name).to(dtype).contiguous()
    # The extremes are NaN or infinite if any value is, and need no copy of the tensor.
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise InputError(
            f"{checkpoint.source}: {name} holds NaN or values beyond {dtype_name(dtype)}: the file "
            "is damaged, or needs --dtype bfloat16"
        )
    return tensor


def _write_configs(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=checkpoint.stop_ids,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
