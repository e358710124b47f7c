"""The config of a base, which the tensors in the folder overrule, and its precision."""

import json
import sys
from pathlib import Path

from llama_lora.cli import InputError, warn_once
from llama_lora.hardware.device import dtype_name, present, resolve_quantization
from llama_lora.model.folder import quantized_weights
from llama_lora.model.folder.tensors import FLOATS, StoredTensors
from llama_lora.text import cause

UNSTRETCHED = None, "default", "llama3"  # kinds of rope whose positions are as config.json says
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def check_folder(folder: Path) -> None:
    """Raise `InputError` unless `folder` holds the config of a base, and no adapter."""
    config, adapter = folder / "config.json", (folder / "adapter_config.json").is_file()
    if not config.is_file():
        if adapter:
            raise InputError(f"{folder}: expected the folder of a base model, found an adapter")
        missing = "" if folder.exists() else ", but the folder does not exist"
        raise InputError(f"{folder}: not a model folder: expected config.json in it{missing}")
    if adapter:  # transformers would load both
        raise InputError(f"{folder}: expected a base alone, found an adapter in the same folder")
    if _settings(folder).get("model_type") is None:
        raise InputError(f'{config}: expected a key "model_type", found none')
    _told(folder)


def read_config(folder: Path):
    """The config of the base in `folder` as transformers reads it, whatever the tensors there.

    Raises:
        InputError: there is no base, it needs code of its own, or its settings make no model.
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
    """The config of the base in `folder` as transformers reads it, corrected by its tensors.

    A stored output layer is not tied to the embeddings, whatever config.json says, unless it equals
    them. Quantized weights count as quantized even if it does not say so. A padding token beyond
    the embeddings is dropped.

    Raises:
        InputError: there is no base, it needs code of its own, or it is quantized in a way that is
            not read here; or its tensors are not quantized as it says, or have an unknown dtype.
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
            f"({folder}: config.json says that the output layer is the embeddings, but the folder "
            "stores another one: that one is used)"
        )
        config.tie_word_embeddings = False
    text = config.get_text_config()
    if (getattr(text, "pad_token_id", None) or 0) >= embedding_rows(config):
        text.pad_token_id = None  # torch takes no such row
    return config


def without_values(config, attention: str = "eager", dtype=None):
    """The model of `config` on the meta device: with names and shapes, but without memory.

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
    """How many token ids, from 0 up, have a row in the embeddings."""
    return config.get_text_config().vocab_size


def positions(config, packed: bool = False) -> int:
    """The longest example that a base is made for, in tokens; unlimited if its config does not say.

    `packed` asks for the longest one that may share a row with others: some kinds of rope choose
    the angles of all examples in a row by the longest.
    """
    config = config.get_text_config()
    trained = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type"), rope.get("factor") or 1
    if packed and kind == "longrope":
        return rope.get("original_max_position_embeddings", trained)
    if packed and kind == "dynamic":
        return trained
    # These kinds stretch the angles, and the config has the number from before stretching.
    if kind in ("linear", "dynamic"):
        return int(trained * factor)
    if kind == "yarn":
        return max(trained, int(rope.get("original_max_position_embeddings", trained) * factor))
    return trained


def beyond_positions(folder, flag: str, tokens: int) -> str | None:
    """What to say if `flag` asks for longer examples than the base in `folder` takes; else None.

    Raises:
        InputError: the base cannot be read; a folder with only a tokenizer has no limit.
    """
    if not Path(folder, "config.json").is_file():
        return None
    check_folder(Path(folder))
    if tokens <= _plain_positions(_settings(Path(folder))):
        return None
    config = read_config(Path(folder))
    most, limit = positions(config), positions(config, packed=True)
    if tokens <= limit:
        return None
    made_for = (
        f"is made for {limit:,} tokens at most (max_position_embeddings in its config.json, with "
        "any rope_scaling)"
    )
    changes = (
        f"has rotary angles that an example of over {limit:,} tokens would change for all others "
        "in its micro-batch (rope_type in its config.json)"
    )
    what = changes if limit < most else made_for
    return f"{flag} {tokens}: the base in {folder} {what}; use {flag} {limit}, or less"


def _plain_positions(settings: dict) -> int:
    """`positions` of a base that stretches no angles, as config.json has it; 0 for any other base.

    Nothing is imported for it. transformers' configs import torch: seconds, and hundreds of MB.
    """
    most = settings.get("max_position_embeddings")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    plain = isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in UNSTRETCHED
    return most if plain and isinstance(most, int) and "text_config" not in settings else 0


def quantized_as(folder) -> str | None:
    """ "8bit" or "4bit" if the folder's weights are stored as bitsandbytes' codes, else None.

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
    """The precision in which to load the base in `folder`, and the reason.

    A base that is stored quantized is loaded as it is. For any other, `resolve_quantization`
    decides for `card` (default: this machine's device).

    Raises:
        InputError: the card cannot compute in it.
    """
    stored = quantized_as(folder)
    if stored is None:
        return resolve_quantization(wanted, card)
    card = card or present()
    if stored == "4bit" and not card.runs_nf4:
        raise InputError(
            f"{folder}: holds 4-bit weights, whose kernels need compute capability 6.0 or higher, "
            f"found {card.shown}; use the base that they were made from, with --quantization 8bit"
        )
    instead = "" if wanted in ("auto", stored) else f", which --quantization {wanted} cannot change"
    return stored, f"{stored} base, as it is stored{instead}"


def _settings(folder: Path) -> dict:
    config = folder / "config.json"
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{config}: not a model's config: {error}") from error
    return settings


def _quantization(folder: Path, precision: str) -> dict:
    """What config.json says about quantization, or ought to."""
    return _told(folder) or {"quant_method": "bitsandbytes", f"load_in_{precision}": True}


def _told(folder: Path) -> dict:
    """The "quantization_config" of config.json; raises `InputError` if it is not an object."""
    told = _settings(folder).get("quantization_config") or {}
    if not isinstance(told, dict):
        raise InputError(
            f'{folder / "config.json"}: expected "quantization_config" to be an object, found '
            f"{told!r}"
        )
    return told


def _check_dtypes(folder: Path, stored: StoredTensors, in_codes: set[str]) -> None:
    """Check that every weight has a dtype in `FLOATS`, except those of layers `in_codes`.

    Integers under other names are counts and positions, not weights.
    """
    for name, tensor in stored.headers.items():
        dtype, weight = dtype_name(tensor.dtype), name.endswith(".weight")
        if dtype in FLOATS or weight and name.removesuffix(".weight") in in_codes:
            continue
        if weight or tensor.is_floating_point():
            expected = ", ".join(FLOATS)
            raise InputError(f"{folder}: expected {name} in {expected}, found {dtype}")


def _tied(stored: StoredTensors) -> bool:
    """Whether the output layer is the embeddings: only one of them is stored, or they are equal.

    Pickles always hold both.
    """
    names = [stored.name_of(parameter) for parameter in (EMBEDDINGS, HEAD)]
    return None in names or stored.equal(*names)
