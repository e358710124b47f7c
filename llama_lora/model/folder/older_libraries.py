"""What readers older than the pinned libraries look for in a folder, besides what those write.

transformers 4 and converters such as Ollama's look for the rotary base in `rope_theta`, and
silently use 10,000 if it is not there. transformers 4 has no tokenizer class `TokenizersBackend`,
and no list of `extra_special_tokens`. peft 0.13 and older refuse keys that they do not know.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

MODEL, TOKENIZER, ADAPTER = "config.json", "tokenizer_config.json", "adapter_config.json"
ROTARY = re.compile("rope_|rotary_|partial_rotary_factor")
# Kinds of scaling from before "type" was called "rope_type".
FIRST_KINDS = "linear", "dynamic"
# Under a name that both generations know, these are read from `tokenizer.json` as it is. A
# LlamaTokenizer would be rebuilt from settings, of which `legacy` is not saved, and with
# `add_prefix_space` from a file that is not there.
BY_FILE = "TokenizersBackend", "LlamaTokenizer"
PEFT_0_13 = {  # the keys of its LoraConfig
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}


def amend(folder: Path, base: Path | None = None) -> None:
    """Add what older readers need to the JSON files that the libraries have written in `folder`.

    For newer readers the files mean the same as before.

    Args:
        folder: a model's or an adapter's.
        base: a folder with a model of the same config; its spelling of the rotary parameters is
            kept.
    """
    own = json.loads((base / MODEL).read_text(encoding="utf-8")) if base else {}
    kept = {key: value for key, value in own.items() if ROTARY.match(key)}
    _rewrite(
        folder / MODEL,
        lambda config: {**_older_rope(config.get("rope_parameters") or {}), **kept, **config},
    )
    _rewrite(folder / TOKENIZER, _older_tokenizer)
    _rewrite(folder / ADAPTER, _older_adapter)


def _rewrite(path: Path, change: Callable[[dict], dict]) -> None:
    if path.is_file():
        settings = change(json.loads(path.read_text(encoding="utf-8")))
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _older_rope(parameters: dict) -> dict:
    """`rope_parameters` as the keys it was made of; nothing if layers differ in it.

    Each model with several kinds of layers spelled that in its own way.
    """
    if "rope_theta" not in parameters:
        return {}
    scaling = dict(parameters)
    apart = {
        key: scaling.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in scaling
    }
    if scaling == {"rope_type": "default"}:
        return apart
    if scaling["rope_type"] in FIRST_KINDS:
        scaling["type"] = scaling.pop("rope_type")
    return {**apart, "rope_scaling": scaling}


def _older_tokenizer(settings: dict) -> dict:
    settings = {"model_input_names": ["input_ids", "attention_mask"], **settings}
    if settings.get("tokenizer_class") in BY_FILE:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def _older_adapter(settings: dict) -> dict:
    """The config without keys that peft 0.13 does not know, unless they are in use."""
    from peft import LoraConfig

    usual = json.loads(json.dumps(LoraConfig().to_dict(), default=list))
    return {
        key: value
        for key, value in settings.items()
        if key in PEFT_0_13 or key not in usual or value != usual[key]
    }
