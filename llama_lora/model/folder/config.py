"""The folder of a base: its config, which the tensors beside it overrule, and its precision."""

import json
import sys
from pathlib import Path

from llama_lora.cli import InputError, warn_once
from llama_lora.hardware.device import dtype_name, present, resolve_quantization
from llama_lora.model.folder import quantized_weights
from llama_lora.model.folder.tensors import FLOATS, StoredTensors
from llama_lora.text import cause

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def check_folder(folder: Path) -> None:
    """Raise `InputError` unless `folder` holds a base model's config, and no adapter beside it."""
    config, adapter = folder / "config.json", (folder / "adapter_config.json").is_file()
    if not config.is_file():
        if adapter:
            raise InputError(f"{folder}: an adapter, expected the folder of its base model")
        missing = "" if folder.exists() else ", but the folder does not exist"
        raise InputError(f"{folder}: not a model folder: expected config.json in it{missing}")
    if adapter:  # transformers would load both
        raise InputError(f"{folder}: expected a base alone, found an adapter in the same folder")
    if _settings(folder).get("model_type") is None:
        raise InputError(f'{config}: expected a key "model_type", found none')
    _told(folder)


def read_config(folder: Path):
    """The config of the base in `folder`, as transformers has it, whatever tensors lie beside it.

    Raises:
        InputError: no base there, or one that needs code of its own; or settings that make none.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    check_folder(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
        StrictDataclassError,
    ) as error:
        raise InputError(f"{folder}: this model cannot be loaded: {cause(error)}") from error


def load_config(folder):
    """The config of the base in `folder`, as transformers has it, put right by its tensors.

    An output layer that is stored is not the embeddings, whatever config.json says, unless it
    equals them; quantized weights are quantized where it says nothing of it; and a padding token
    beyond the embeddings is none.

    Raises:
        InputError: no base there, or one that needs code of its own, or is quantized in a way that
            is not read here; or tensors that are not quantized as it says, or no floats of ours.
    """
    folder = Path(folder)
    config = read_config(folder)
    if other := getattr(config, "transformers_weights", None):
        raise InputError(f"{folder}: config.json names other weights ({other}), which is not read")
    stored = StoredTensors(folder)
    in_codes = set()
    if precision := quantized_as(folder):
        quantized_weights.check(folder, stored, precision)
        in_codes = quantized_weights.layers(stored, precision)
        config.quantization_config = _quantization(folder, precision)
    _check_dtypes(folder, stored, in_codes)
    if getattr(config, "tie_word_embeddings", False) and not _tied(stored):
        warn_once(
            f"({folder}: config.json says that the output layer is the embeddings, but another "
            "one is stored: that is used)"
        )
        config.tie_word_embeddings = False
    text = config.get_text_config()
    if (getattr(text, "pad_token_id", None) or 0) >= embedding_rows(config):
        text.pad_token_id = None  # torch takes no such row
    return config


def without_values(config, attention: str = "eager", dtype=None):
    """The model of `config` on the meta device, where it has names and shapes and takes no memory.

    Args:
        attention: the implementation; the config may ask for one that is not installed.
        dtype: of its parameters; None for the config's own.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )


def embedding_rows(config) -> int:
    """How many tokens have a row of the embeddings: ids from 0 up."""
    return config.get_text_config().vocab_size


def positions(config, packed: bool = False) -> int:
    """The most tokens in a row that a base is made for; any number if its config does not say.

    `packed` asks for the most of an example that is computed beside others: some kinds of rope
    choose the angles of all of them by the longest.
    """
    config = config.get_text_config()
    trained = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type"), rope.get("factor") or 1
    if packed and kind == "longrope":
        return rope.get("original_max_position_embeddings", trained)
    if packed and kind == "dynamic":
        return trained
    # Angles that are stretched afterwards: these kinds leave the number before that in the config.
    if kind in ("linear", "dynamic"):
        return int(trained * factor)
    if kind == "yarn":
        return max(trained, int(rope.get("original_max_position_embeddings", trained) * factor))
    return trained


def beyond_positions(folder, flag: str, tokens: int) -> str | None:
    """The line to say if `flag` asks for longer examples than the base in `folder` is made for.

    Raises:
        InputError: the base there cannot be read; a tokenizer alone is made for any number.
    """
    if not Path(folder, "config.json").is_file():
        return None
    config = read_config(Path(folder))
    most, limit = positions(config), positions(config, packed=True)
    if tokens <= limit:
        return None
    made_for = (
        f"is made for {limit:,} tokens in a row (max_position_embeddings in its config.json, with "
        "any rope_scaling)"
    )
    changes = (
        f"has rotary angles that examples of over {limit:,} tokens would change for all others of "
        "their micro-batch (rope_type in its config.json)"
    )
    what = changes if limit < most else made_for
    return f"{flag} {tokens}: the base in {folder} {what}; use {flag} {limit}, or less"


def quantized_as(folder) -> str | None:
    """ "8bit" or "4bit" where the folder's weights are stored as bitsandbytes' codes, else None.

    Raises:
        InputError: they are quantized in another way.
    """
    check_folder(Path(folder))
    if told := _told(Path(folder)):
        bits = [bits for bits in ("8bit", "4bit") if told.get(f"load_in_{bits}")]
        if not bits or told.get("quant_method", "bitsandbytes") != "bitsandbytes":
            method = told.get("quant_method", "an unknown method")
            raise InputError(
                f"{folder}: its weights are quantized with {method}, expected 16 bits, or 8 or 4 "
                "bits of bitsandbytes: use the base that they were made from"
            )
        return bits[0]
    return quantized_weights.precision_of(StoredTensors(folder))


def resolve_precision(folder, wanted: str, card=None) -> tuple[str, str]:
    """The precision to load the base in `folder` in, and the reason.

    A base that is stored quantized is loaded as what it is; of another, `resolve_quantization`
    decides for `card` (default: the device here).

    Raises:
        InputError: the card cannot compute in it.
    """
    stored = quantized_as(folder)
    if stored is None:
        return resolve_quantization(wanted, card)
    card = card or present()
    if stored == "8bit" and not card.runs_int8:
        raise InputError(
            f"{folder}: holds 8-bit weights, whose kernels need compute capability 7.5 or higher, "
            f"found {card.shown}; use the base that they were made from, with --quantization 4bit"
        )
    instead = "" if wanted in ("auto", stored) else f", which --quantization {wanted} cannot change"
    return stored, f"{stored} base, as its folder holds it{instead}"


def _settings(folder: Path) -> dict:
    config = folder / "config.json"
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{config}: not a model's config: {error}") from error
    return settings


def _quantization(folder: Path, precision: str) -> dict:
    """What config.json says of it, or ought to."""
    return _told(folder) or {"quant_method": "bitsandbytes", f"load_in_{precision}": True}


def _told(folder: Path) -> dict:
    """What config.json says of how the weights are quantized; raises `InputError`: no object."""
    told = _settings(folder).get("quantization_config") or {}
    if not isinstance(told, dict):
        raise InputError(
            f'{folder / "config.json"}: expected "quantization_config" to be an object, found '
            f"{told!r}"
        )
    return told


def _check_dtypes(folder: Path, stored: StoredTensors, in_codes: set[str]) -> None:
    """Every weight is of one of the `FLOATS`, apart from those of layers `in_codes`.

    Integers under other names are counts and positions, which are no weights.
    """
    for name, tensor in stored.headers.items():
        dtype, weight = dtype_name(tensor.dtype), name.endswith(".weight")
        if dtype in FLOATS or weight and name.removesuffix(".weight") in in_codes:
            continue
        if weight or tensor.is_floating_point():
            expected = ", ".join(FLOATS)
            raise InputError(f"{folder}: expected {name} in {expected}, found {dtype}")


def _tied(stored: StoredTensors) -> bool:
    """Whether the output layer is the embeddings: one of them alone is stored, or they are equal.

    Pickles hold both in any case.
    """
    names = [stored.name_of(parameter) for parameter in (EMBEDDINGS, HEAD)]
    return None in names or stored.equal(*names)
