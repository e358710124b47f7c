"""GGUF files of Llama's architecture, quantized or not, read one tensor at a time.

The file's keys are described in llama.cpp's gguf-py/gguf/constants.py. transformers reads GGUF too,
but it holds the whole model in memory, ignores the rotary scaling of Llama 3.1 and later
(`rope_freqs`), and for several vocabularies cuts text differently from the model's own tokenizer.
"""

import math
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama_lora.cli import InputError
from llama_lora.weights.hf_writer import Checkpoint, parameter_shapes, split_rotary_halves
from llama_lora.weights.llama_tokenizer import (
    NORMAL,
    byte_level_bpe,
    finish,
    llama3_pre_tokenizer,
    sentencepiece_bpe,
)

# Hugging Face module -> GGUF's; those of a layer are "blk.N." and one of these.
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
OF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")

LLAMA3_CUTS = ("llama3", "llama-v3", "llama-bpe", "smaug-bpe")
CHUNK = 1 << 24  # weights dequantized at a time: unpacking takes several times their memory


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file of Llama's architecture.

    Raises:
        InputError: it is not GGUF, is cut off, has another architecture, or holds something that a
            `LlamaForCausalLM` has no place for.
    """
    reader = _open_reader(path)
    fields = Fields(path, reader)
    architecture = fields.get("general.architecture", str)
    if architecture != "llama":
        raise InputError(f"{path}: expected the architecture 'llama', found {architecture!r}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _read_config(path, fields, tensors)
    _check_tensors(path, config, tensors)
    tokenizer = _read_tokenizer(path, fields)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{path}: expected at most {config.vocab_size} tokens, as many as token_embd.weight "
            f"has rows, found {len(tokenizer)}"
        )

    def load(name: str) -> torch.Tensor:
        weight = _dequantise(tensors[gguf_name(name)])
        if name.endswith("q_proj.weight"):
            return split_rotary_halves(weight, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            return split_rotary_halves(weight, config.num_key_value_heads)
        return weight

    end_of_turn = fields.get("tokenizer.ggml.eot_token_id", int, None)
    return Checkpoint(
        source=path,
        config=config,
        tokenizer=tokenizer,
        stop_ids=[
            id for id in dict.fromkeys([tokenizer.eos_token_id, end_of_turn]) if id is not None
        ],
        dtype=_stored_dtype(reader),
        load=load,
    )


def gguf_name(name: str) -> str:
    """ "model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight"."""
    if match := LAYER.fullmatch(name):
        return f"blk.{match[1]}.{OF_LAYER[match[2]]}.weight"
    return TOP[name.removesuffix(".weight")] + ".weight"


class Fields:
    """The metadata of a GGUF file, with the type of every value checked."""

    def __init__(self, path: Path, reader: gguf.GGUFReader):
        self.path = path
        self.reader = reader

    def get(self, key: str, kind: type, *default):
        """The value of `key`; without a `default`, its absence is an `InputError`."""
        field = self.reader.fields.get(key)
        if field is None:
            if default:
                return default[0]
            raise InputError(f"{self.path}: expected the key {key!r}, found none")
        value = field.contents()
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind):
            raise InputError(
                f"{self.path}: expected {key!r} to be {kind.__name__}, found {type(value).__name__}"
            )
        return value


def _open_reader(path: Path) -> gguf.GGUFReader:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise InputError(f"{path}: expected a GGUF file, found one that begins with {magic!r}")
        return gguf.GGUFReader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        size = path.stat().st_size
        raise InputError(
            f"{path}: expected more than its {size} bytes: the file is cut off or damaged ({error})"
        ) from error


def _read_config(path: Path, fields: Fields, tensors: dict) -> LlamaConfig:
    if fields.get("split.count", int, 1) > 1:
        raise InputError(
            f"{path}: is one of several parts; join them with llama-gguf-split --merge"
        )
    if fields.get("llama.expert_count", int, 0):
        raise InputError(f"{path}: expected a dense Llama model, found a mixture of experts")
    if "token_embd.weight" not in tensors:
        raise InputError(f"{path}: expected the tensor token_embd.weight, found none")
    heads = fields.get("llama.attention.head_count", int)
    dim = fields.get("llama.embedding_length", int)
    head_dim = fields.get("llama.attention.key_length", int, dim // heads if heads else 0)
    if (
        heads < 1
        or head_dim < 2
        or head_dim != fields.get("llama.rope.dimension_count", int, head_dim)
    ):
        raise InputError(
            f"{path}: expected heads that are rotated whole, found {heads} heads of {head_dim}"
        )
    config = LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        hidden_size=dim,
        intermediate_size=fields.get("llama.feed_forward_length", int),
        num_hidden_layers=fields.get("llama.block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        max_position_embeddings=fields.get("llama.context_length", int),
        rms_norm_eps=_shortest(fields.get("llama.attention.layer_norm_rms_epsilon", float)),
        rope_parameters=_rope(path, fields),
        tie_word_embeddings="output.weight" not in tensors,
    )
    if "rope_freqs.weight" in tensors:
        _recover_rope_scaling(path, config, tensors["rope_freqs.weight"].data)
    return config


def _rope(path: Path, fields: Fields) -> dict:
    theta = _shortest(fields.get("llama.rope.freq_base", float, 10_000.0))
    scaling = fields.get("llama.rope.scaling.type", str, "none")
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling == "linear":
        factor = fields.get("llama.rope.scaling.factor", float)
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    raise InputError(f"{path}: expected rope scaling 'none' or 'linear', found {scaling!r}")


def _recover_rope_scaling(path: Path, config: LlamaConfig, factors: np.ndarray) -> None:
    """Set Llama 3.1's rotary scaling, which GGUF stores as one divisor for each frequency."""
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": round(
            float(factors.max()), 3
        ),  # the slowest frequencies are divided by all of it
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    stored = torch.tensor(factors)
    if stored.shape != plain.shape or not torch.allclose(plain / scaled, stored, rtol=1e-3):
        raise InputError(
            f"{path}: expected rope_freqs.weight to scale as in Llama 3.1, found another scaling"
        )


def _check_tensors(path: Path, config: LlamaConfig, tensors: dict) -> None:
    expected = {gguf_name(name): shape for name, shape in parameter_shapes(config).items()}
    for name, shape in expected.items():
        found = tuple(map(int, reversed(tensors[name].shape))) if name in tensors else "none"
        if found != shape:
            raise InputError(f"{path}: expected the tensor {name} of shape {shape}, found {found}")
    computed = ("rope_freqs.weight", "attn_rot_embd.weight")
    for name in tensors:
        if name not in expected and not name.endswith(computed):
            raise InputError(f"{path}: expected only the tensors of a Llama model, found {name}")


def _stored_dtype(reader: gguf.GGUFReader) -> torch.dtype:
    """bfloat16 for a bfloat16 file, which keeps every value; otherwise float16.

    A quantized weight is a product of float16 scales. float16 rounds it eight times finer than
    bfloat16, and cards without bfloat16 (T4, P100) compute in float16.
    """
    types = {tensor.tensor_type for tensor in reader.tensors}
    plain = {gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32}
    bfloat16 = gguf.GGMLQuantizationType.BF16 in types and types <= plain
    return torch.bfloat16 if bfloat16 else torch.float16


def _dequantise(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """The values of a tensor in float32, some rows at a time."""
    shape = tuple(map(int, reversed(tensor.shape)))
    values = torch.empty(shape)
    step = max(CHUNK // math.prod(shape[1:]), 1)
    for start in range(0, shape[0], step):
        rows = gguf.quants.dequantize(tensor.data[start : start + step], tensor.tensor_type)
        values[start : start + step] = torch.from_numpy(np.array(rows))
    return values


def _read_tokenizer(path: Path, fields: Fields) -> PreTrainedTokenizerFast:
    kind = fields.get("tokenizer.ggml.model", str)
    tokens = fields.get("tokenizer.ggml.tokens", list)
    kinds = fields.get("tokenizer.ggml.token_type", list, [NORMAL] * len(tokens))
    cut = fields.get("tokenizer.ggml.pre", str, "default")
    if kind == "llama":
        scores = fields.get("tokenizer.ggml.scores", list)
        prefix = fields.get("tokenizer.ggml.add_space_prefix", bool, True)
        backend = sentencepiece_bpe(tokens, scores, kinds, prefix)
    elif kind == "gpt2":
        backend = _byte_level(path, fields, tokens, kinds, cut)
    else:
        raise InputError(f"{path}: expected a tokenizer 'llama' or 'gpt2', found {kind!r}")

    def token(role: str) -> str | None:
        id = fields.get(f"tokenizer.ggml.{role}_token_id", int, None)
        return tokens[id] if id is not None and id < len(tokens) else None

    # What llama.cpp does if the file does not say: bos for SentencePiece and Llama 3.
    adds_bos = kind == "llama" or cut in LLAMA3_CUTS
    return finish(
        backend,
        path,
        bos=token("bos"),
        eos=token("eos"),
        unk=token("unknown"),
        pad=token("padding"),
        add_bos=fields.get("tokenizer.ggml.add_bos_token", bool, adds_bos),
        chat_template=fields.get("tokenizer.chat_template", str, None),
    )


def _byte_level(path: Path, fields: Fields, tokens: list, kinds: list, cut: str) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", list)]
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if cut in LLAMA3_CUTS:
        pre_tokenizer = llama3_pre_tokenizer()
    elif cut == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    elif cut == "gpt-2":
        pre_tokenizer = gpt2
    else:
        known = ", ".join((*LLAMA3_CUTS, "smollm", "gpt-2"))
        raise InputError(f"{path}: expected tokenizer.ggml.pre to be one of {known}, found {cut!r}")
    return byte_level_bpe(tokens, merges, kinds, pre_tokenizer, ignore_merges=cut in LLAMA3_CUTS)


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))
