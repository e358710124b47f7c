"""Load a base model in 16 (or 32), 8 or 4 bits."""

import json
import logging
from pathlib import Path

from llama_lora.cli import InputError
from llama_lora.model.hardware import compute_dtype, present


def load_base(folder, quantization: str = "none", dtype=None, device=None):
    """Load a Llama-architecture base for inference or LoRA training.

    Args:
        folder: a Hugging Face model folder.
        quantization: "8bit" (LLM.int8, Dettmers et al. 2022), "4bit" (NF4 with double
            quantization, Dettmers et al. 2023) or "none"; norms, embeddings and head in `dtype`.
        dtype: of activations and unquantized weights; default: the device's `compute_dtype()`.
        device: default: the current CUDA device, else the CPU.

    Raises:
        InputError: no model in the folder, or weights that do not match its config.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from llama_lora.model import attention

    check_folder(Path(folder))
    # One warning per linear layer and step, about a cast that is int8's normal way of working.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    dtype = dtype or compute_dtype()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=_quantization_config(quantization, dtype),
            device_map={"": device},
            attn_implementation=attention.implementation(present()),
            local_files_only=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder}: this model cannot be loaded: {error}") from error
    keep_nf4_layout(model)
    return model


def keep_nf4_layout(model) -> None:
    """Leave the weights of 4-bit layers as they are quantized, whatever the CPU.

    Where it has AVX512-BF16, bitsandbytes packs them at the first forward pass in `eval()`, for a
    kernel without a backward pass, and never unpacks them: training would go on with gradients
    that are wrong.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _quantization_config(quantization: str, dtype):
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def check_folder(folder: Path) -> None:
    """Raise `InputError` unless `folder` holds a base model's config."""
    config = folder / "config.json"
    if not config.is_file():
        if (folder / "adapter_config.json").is_file():
            raise InputError(f"{folder}: an adapter, expected the folder of its base model")
        missing = "" if folder.exists() else ", but the folder does not exist"
        raise InputError(f"{folder}: not a model folder: expected config.json in it{missing}")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{config}: not a model's config: {error}") from error
    if model_type is None:
        raise InputError(f'{config}: expected a key "model_type", found none')
