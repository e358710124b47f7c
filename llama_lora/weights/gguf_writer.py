"""Writes a Hugging Face folder of a Llama as one GGUF file, which llama.cpp runs.

The keys are those of llama.cpp's gguf-py/gguf/constants.py. The layout of the tensors is that of
its convert_hf_to_gguf.py: rows of queries and keys are in Meta's rotary order, and everything but
matrices is in float32.
"""

import math
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama_lora.cli import InputError
from llama_lora.model.template import Template, load_tokenizer
from llama_lora.weights import gguf_tokenizer
from llama_lora.weights.gguf_reader import gguf_name
from llama_lora.weights.hf_reader import FolderWeights
from llama_lora.weights.hf_writer import parameter_shapes

FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "Q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
COARSE = ("Q5_1", "Q5_0", "Q4_1", "Q4_0")
ENDS = ("model.embed_tokens.weight", "lm_head.weight")
FREQUENCIES = "rope_freqs.weight"
CHUNK = 1 << 24  # weights quantized at a time: it takes several times their memory


def check(source: Path, config, tokenizer, shapes: dict) -> None:
    """Raise `InputError` if a model cannot be written as a GGUF file.

    Args:
        source: the folder it comes from, for the message.
        shapes: of its parameters by name.
    """
    if config.model_type != "llama" or shapes != parameter_shapes(config):
        raise InputError(
            f"{source}: GGUF: expected a Llama without biases, found {config.model_type} with "
            f"{len(shapes)} tensors"
        )
    if config.rope_parameters["rope_type"] not in ("default", "linear", "llama3"):
        found = config.rope_parameters["rope_type"]
        raise InputError(
            f"{source}: GGUF: expected rope scaling default, linear or llama3, found {found}"
        )
    gguf_tokenizer.read(source, tokenizer, config.vocab_size)


def size(shapes: dict, kind: str) -> int:
    """Bytes of the tensors in a file of `kind`."""
    return sum(_bytes(shape, stored_kind(name, shape, kind)) for name, shape in shapes.items())


def stored_kind(name: str, shape: tuple[int, ...], kind: str) -> Kind:
    """How a parameter is stored in a file of `kind`.

    Embeddings and head matter most for the answers, so they are never coarser than Q8_0. Matrices
    whose rows are not whole blocks are F16.
    """
    if len(shape) == 1:
        return Kind.F32
    wanted = Kind.Q8_0 if kind in COARSE and name in ENDS else Kind[kind]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return Kind.F16 if shape[-1] % block else wanted


def write(folder: Path, file: Path, kind: str) -> None:
    """Write the model in `folder` to `file`; memory holds one tensor at a time.

    Args:
        kind: "F32", "F16", "BF16", or one of llama.cpp's block types "Q8_0", "Q5_1", "Q5_0",
            "Q4_1", "Q4_0", rounded as llama.cpp's own reference code does.

    Raises:
        InputError: as `check`; or a weight does not fit float16.
    """
    weights = FolderWeights(folder)
    config, tokenizer = weights.config, load_tokenizer(folder)
    check(folder, config, tokenizer, weights.shapes)
    writer = gguf.GGUFWriter(file, "llama")
    try:
        _describe(writer, file, config, kind)
        gguf_tokenizer.read(folder, tokenizer, config.vocab_size).describe(writer)
        _describe_chat(writer, tokenizer)
        _write_tensors(writer, weights, kind)
    finally:
        writer.close()


def _describe(writer: gguf.GGUFWriter, file: Path, config, kind: str) -> None:
    writer.add_type("model")
    writer.add_name(file.stem)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _describe_chat(writer: gguf.GGUFWriter, tokenizer) -> None:
    """Add the chat template and, if it is not eos, the token that ends an answer."""
    if not tokenizer.chat_template:
        return
    writer.add_chat_template(tokenizer.chat_template)
    ends = [id for id in Template(tokenizer, "model").stop_ids if id != tokenizer.eos_token_id]
    if ends:
        writer.add_eot_token_id(ends[0])


def _write_tensors(writer: gguf.GGUFWriter, weights: FolderWeights, kind: str) -> None:
    from tqdm import tqdm

    config = weights.config
    kinds = {name: stored_kind(name, shape, kind) for name, shape in weights.shapes.items()}
    frequencies = _divisors(config)
    if frequencies is not None:
        writer.add_tensor_info(
            FREQUENCIES, frequencies.shape, frequencies.dtype, frequencies.nbytes, Kind.F32
        )
    for name, shape in weights.shapes.items():
        # Not as uint8, so that the shape is taken as it is.
        size = _bytes(shape, kinds[name])
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), size, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if frequencies is not None:
        writer.write_tensor_data(frequencies)
    for name, stored in tqdm(
        kinds.items(), desc=f"GGUF {kind}", unit="tensor", leave=False, disable=None
    ):
        weight = weights.load(name)
        if name.endswith("q_proj.weight"):
            weight = join_rotary_pairs(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = join_rotary_pairs(weight, config.num_key_value_heads)
        writer.write_tensor_data(_encode(weights.folder, name, weight, stored))


def join_rotary_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection from Hugging Face's rotary layout to Meta's:
    the inverse of `hf_writer.split_rotary_halves`. Shape (heads·head_dim, dim) stays.
    """
    rows, dim = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, dim)
    return halves.transpose(1, 2).reshape(rows, dim)


def _divisors(config) -> np.ndarray | None:
    """What Llama 3.1's scaling divides each rotary frequency by, of shape (head_dim / 2,)."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    return (config.rope_parameters["rope_theta"] ** -exponents / scaled).float().numpy()


def _encode(folder: Path, name: str, weight: torch.Tensor, kind: Kind) -> np.ndarray:
    """The bytes of a tensor, some rows at a time."""
    matrix = weight.reshape(-1, weight.shape[-1])
    data = np.empty((len(matrix), _bytes((matrix.shape[1],), kind)), np.uint8)
    step = max(CHUNK // matrix.shape[1], 1)
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step].float().numpy()
        if kind == Kind.F16 and np.abs(rows).max() > np.finfo(np.float16).max:
            raise InputError(f"{folder}: {name} has values beyond float16; use BF16 or F32")
        data[start : start + step] = gguf.quants.quantize(rows, kind).view(np.uint8)
    return data


def _bytes(shape: tuple[int, ...], kind: Kind) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size
