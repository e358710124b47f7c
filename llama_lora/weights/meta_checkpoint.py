"""Meta's checkpoint layout: `params.json`, `consolidated.NN.pth`, `tokenizer.model`.

LLaMA 1 and 2, Code Llama, and the text models of Llama 3 to 3.3, in any number of shards.
"""

import json
import pickle
import re
from pathlib import Path

import torch
from transformers import LlamaConfig

from llama_lora.cli import InputError
from llama_lora.text import brief
from llama_lora.weights.hf_writer import Checkpoint, parameter_shapes, split_rotary_halves
from llama_lora.weights.llama_tokenizer import read_tokenizer_model

Shard = dict[str, torch.Tensor]

# Hugging Face module -> Meta's; those of a layer are "layers.N." and one of these.
TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
OF_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
BUFFER = re.compile(r"(^|\.)rope\.freqs$")  # computed, not learned: older checkpoints carry it


def open_meta_checkpoint(input_dir: Path, model_size: str | None = None) -> Checkpoint:
    """Open Meta's checkpoint in `input_dir/model_size`, or in `input_dir` itself.

    Dimensions come from `params.json` and the tensors. The tensors stay on disk (mmap) and are
    joined from their shards one at a time.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others.
    """
    folder = _find_folder(input_dir, model_size)
    params = _read_params(folder / "params.json")
    shards = _open_shards(folder)
    tokenizer = read_tokenizer_model(
        _find_tokenizer(folder, input_dir), scaled_rope=params["use_scaled_rope"]
    )
    config = _read_config(folder, params, shards, tokenizer.byte_level)
    vocab_size = len(tokenizer.tokenizer)
    if vocab_size != config.vocab_size:
        raise InputError(
            f"{folder}: expected a tokenizer.model of {config.vocab_size} tokens, as many as the "
            f"embeddings, found one of {vocab_size}"
        )
    axes = _cut_axes(folder, config, shards)
    stored = shards[0]["layers.0.attention.wq.weight"].dtype

    def load(name: str) -> torch.Tensor:
        pieces = [shard[meta_name(name)] for shard in _holders(shards, config, name)]
        weight = pieces[0] if axes[name] is None else torch.cat(pieces, dim=axes[name])
        if name.endswith("q_proj.weight"):
            return split_rotary_halves(weight, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            return split_rotary_halves(weight, config.num_key_value_heads)
        return weight

    return Checkpoint(
        source=folder,
        config=config,
        tokenizer=tokenizer.tokenizer,
        stop_ids=tokenizer.stop_ids,
        # Meta's are 16-bit files, kept as they are. float16 has three more bits than bfloat16 for a
        # weight, and cards without bfloat16 (T4, P100) compute in it.
        dtype=stored if stored.itemsize == 2 else torch.float16,
        load=load,
    )


def meta_name(name: str) -> str:
    """ "model.layers.3.mlp.up_proj.weight" -> "layers.3.feed_forward.w3.weight"."""
    if match := LAYER.fullmatch(name):
        return f"layers.{match[1]}.{OF_LAYER[match[2]]}.weight"
    return TOP[name.removesuffix(".weight")] + ".weight"


def _find_folder(input_dir: Path, model_size: str | None) -> Path:
    candidates = [input_dir / model_size, input_dir] if model_size else [input_dir]
    for folder in candidates:
        if (folder / "params.json").is_file():
            return folder
    found = "no such folder"
    if input_dir.is_dir():
        found = ", ".join(sorted(p.name for p in input_dir.iterdir())[:8]) or "an empty folder"
    expected = " or ".join(str(folder / "params.json") for folder in candidates)
    raise InputError(f"{input_dir}: expected {expected}, found {found}")


def _find_tokenizer(folder: Path, input_dir: Path) -> Path:
    candidates = dict.fromkeys(
        place / "tokenizer.model" for place in (folder, input_dir, folder.parent)
    )
    for path in candidates:
        if path.is_file():
            return path
    raise InputError(f"{folder}: expected {' or '.join(map(str, candidates))}, found none of them")


def _read_params(path: Path) -> dict:
    try:
        params = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: expected JSON: {error}") from error
    if not isinstance(params, dict):
        raise InputError(f"{path}: expected an object, found {type(params).__name__}")
    # Meta's own defaults (ModelArgs) for what older files leave out; -1 means "see the tensors".
    params = {"vocab_size": -1, "norm_eps": 1e-5, "use_scaled_rope": False} | params
    params["n_kv_heads"] = params.get("n_kv_heads") or params.get("n_heads")
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads"):
        if not isinstance(params.get(key), int) or params[key] < 1:
            raise InputError(f"{path}: expected a whole number {key!r}, found {params.get(key)!r}")
    dim, heads, kv_heads = params["dim"], params["n_heads"], params["n_kv_heads"]
    if dim % (2 * heads) or heads % kv_heads:
        raise InputError(
            f"{path}: expected dim to be a multiple of 2·n_heads, and n_heads of n_kv_heads; found "
            f"dim {dim}, n_heads {heads}, n_kv_heads {kv_heads}"
        )
    return params


def _open_shards(folder: Path) -> list[Shard]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    expected = [f"consolidated.{number:02}.pth" for number in range(max(len(paths), 1))]
    if [path.name for path in paths] != expected:
        found = ", ".join(path.name for path in paths) or "none"
        raise InputError(f"{folder}: expected {', '.join(expected)}, found {found}")
    return [_open_shard(path) for path in paths]


def _open_shard(path: Path) -> Shard:
    try:
        shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: expected a PyTorch checkpoint, found damage: {brief(error)}"
        ) from error
    tensors = isinstance(shard, dict) and all(torch.is_tensor(value) for value in shard.values())
    if not tensors:
        raise InputError(f"{path}: expected a dictionary of tensors, found {type(shard).__name__}")
    return {name: tensor for name, tensor in shard.items() if not BUFFER.search(name)}


def _read_config(folder: Path, params: dict, shards: list[Shard], byte_level: bool) -> LlamaConfig:
    _check_shard_count(folder, params, shards)
    tied = _is_tied(shards)
    # The vocabulary is cut by rows in `output`, and by rows or columns in `tok_embeddings`.
    rows, columns = _tensor(folder, shards, "tok_embeddings.weight").shape
    vocab_size = rows if columns * len(shards) == params["dim"] else rows * len(shards)
    if params["vocab_size"] > 0 and params["vocab_size"] != vocab_size:
        raise InputError(
            f"{folder}: expected the vocab_size {params['vocab_size']} of params.json, found "
            f"{vocab_size} rows in tok_embeddings.weight"
        )
    hidden = _tensor(folder, shards, "layers.0.feed_forward.w1.weight").shape[0] * len(shards)
    rope = {"rope_type": "default"}
    if params["use_scaled_rope"]:
        rope = {
            "rope_type": "llama3",
            # No file states it. It is 8 except in Llama 3.2's 1B and 3B, the only ones with tied
            # embeddings (meta-llama/llama-models issues 166 and 241).
            "factor": 32.0 if tied else 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    theta = float(params.get("rope_theta", 500_000 if byte_level else 10_000))
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=params["dim"],
        intermediate_size=hidden,
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params["n_kv_heads"],
        max_position_embeddings=_context_length(params, theta, byte_level),
        rms_norm_eps=params["norm_eps"],
        rope_parameters={**rope, "rope_theta": theta},
        tie_word_embeddings=tied,
    )


def _context_length(params: dict, theta: float, byte_level: bool) -> int:
    """The context length of each generation, from Meta's model cards: no file states it."""
    if params["use_scaled_rope"]:
        return 131_072  # Llama 3.1 and later
    if byte_level:
        return 8_192  # Llama 3
    if theta > 10_000:
        return 16_384  # Code Llama
    # LLaMA 1 has the smaller epsilon, except its 65B. That one has a key head for every query head,
    # unlike Llama 2's 70B.
    is_65b = params["dim"] == 8192 and params["n_kv_heads"] == params["n_heads"]
    return 2_048 if params["norm_eps"] < 5e-6 or is_65b else 4_096


def _check_shard_count(folder: Path, params: dict, shards: list[Shard]) -> None:
    rows = _tensor(folder, shards, "layers.0.attention.wq.weight").shape[0]
    expected = params["dim"] // rows if rows and params["dim"] % rows == 0 else 0
    if expected and expected != len(shards):
        raise InputError(
            f"{folder}: expected {expected} files consolidated.NN.pth (each holds {rows} of the "
            f"{params['dim']} query rows), found {len(shards)}"
        )


def _is_tied(shards: list[Shard]) -> bool:
    """Whether the output projection is the embeddings: it is absent, or has the same values."""
    if "output.weight" not in shards[0]:
        return True
    names = ("tok_embeddings.weight", "output.weight")
    return all(
        all(name in shard for name in names) and torch.equal(*(shard[name] for name in names))
        for shard in shards
    )


def _tensor(folder: Path, shards: list[Shard], name: str, ndim: int = 2) -> torch.Tensor:
    tensor = shards[0].get(name)
    if tensor is None or tensor.ndim != ndim:
        found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise InputError(
            f"{folder}/consolidated.00.pth: expected {name} of {ndim} dimensions, found {found}"
        )
    return tensor


def _cut_axes(folder: Path, config: LlamaConfig, shards: list[Shard]) -> dict[str, int | None]:
    """For each parameter, the axis along which the shards cut it; None if it is whole.

    Meta cuts by rows (column-parallel layers, Llama 3's embeddings), by columns (row-parallel
    layers, LLaMA 1 and 2's embeddings), or not at all (norms). The shapes say which: a shard is
    short along the axis that was cut. Checks every tensor of every shard on the way.
    """
    axes = {}
    unknown = [dict(shard) for shard in shards]
    for name, whole in parameter_shapes(config).items():
        pieces = []
        for number, shard in enumerate(unknown):
            piece = shard.pop(meta_name(name), None)
            if piece is None:
                raise InputError(
                    f"{folder}/consolidated.{number:02}.pth: {meta_name(name)} is missing"
                )
            pieces.append(tuple(piece.shape))
        count = len(_holders(shards, config, name))
        fitting = [
            axis
            for axis in (None, *range(len(whole)))
            if _joined_shape(pieces[0], axis, count) == whole
        ]
        if not fitting or len(set(pieces)) > 1:
            raise InputError(
                f"{folder}: expected {meta_name(name)} to be {whole}, whole or cut evenly in "
                f"{count}; found {', '.join(map(str, dict.fromkeys(pieces)))}"
            )
        axes[name] = fitting[0]
    for number, shard in enumerate(unknown):
        shard.pop("output.weight", None)  # of a tied model
        if shard:
            raise InputError(
                f"{folder}/consolidated.{number:02}.pth: expected only the tensors of a Llama text "
                f"model of {config.num_hidden_layers} layers, found {next(iter(shard))}"
            )
    return axes


def _joined_shape(piece: tuple[int, ...], axis: int | None, count: int) -> tuple[int, ...]:
    """The shape of `count` pieces joined along `axis`, or of a single piece if it is None."""
    return tuple(size * count if place == axis else size for place, size in enumerate(piece))


def _holders(shards: list[Shard], config: LlamaConfig, name: str) -> list[Shard]:
    """The shards that together hold a parameter once.

    With more shards than key-value heads, neighbours hold copies of the same head.
    """
    if name.endswith(("k_proj.weight", "v_proj.weight")):
        return shards[:: max(len(shards) // config.num_key_value_heads, 1)]
    return shards
