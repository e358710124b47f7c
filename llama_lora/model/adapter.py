"""Attach, save, verify and load a LoRA adapter (Hu et al. 2021) through peft."""

from pathlib import Path

from llama_lora.cli import InputError

WEIGHTS = "adapter_model.safetensors"


def attach(model, r: int, alpha: int, dropout: float, target_modules: list[str], **kinds):
    """Freeze `model` and add trainable LoRA matrices (fp32) to its target modules.

    Args:
        model: a base from `load_base`, in any precision. Unlike peft's
            `prepare_model_for_kbit_training`, nothing of it is cast to fp32: norms compute in fp32
            by themselves, and fp32 norm weights would make every activation fp32 too.
        target_modules: names such as `["q_proj", "v_proj"]`, or `["all-linear"]`.
        kinds: `use_dora` and `use_rslora` of peft's LoraConfig.

    Raises:
        InputError: a target module that the base does not have.
    """
    from peft import LoraConfig, get_peft_model

    if kinds.get("use_dora") and model.device.type == "cpu" and _is_int8(model):
        # peft reads the weights for DoRA and, on a CPU, moves them, which loses their scales.
        raise InputError("--use_dora: not with an 8-bit base on a CPU; use --quantization 4bit")
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_targets(model, target_modules),
        bias="none",
        task_type="CAUSAL_LM",
        **kinds,
    )
    return get_peft_model(model, config)


def save(model, template, folder) -> None:
    """Save a trained adapter with its tokenizer and chat template, then verify what was written."""
    model.save_pretrained(folder, safe_serialization=True)
    template.tokenizer.save_pretrained(folder)
    verify(folder, model)


def verify(folder, model) -> None:
    """Check that the adapter in `folder` is the trained one of `model`, whole and loadable.

    The weights file exists, loads through peft, holds exactly the target modules' matrices, every
    value finite and equal to the model's, and at least one B matrix has left its initial zero.

    Raises:
        InputError: the first of these that does not hold.
    """
    import torch
    from peft import PeftConfig, get_peft_model_state_dict

    PeftConfig.from_pretrained(folder)
    saved, expected = read_weights(folder), get_peft_model_state_dict(model)
    where = Path(folder) / WEIGHTS
    if set(saved) != set(expected):
        differing = sorted(set(saved) ^ set(expected))
        raise InputError(
            f"{where}: expected the {len(expected)} matrices of the target modules, "
            f"found {len(saved)}; first difference: {differing[0]}"
        )
    for name, tensor in saved.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{where}: {name} holds values that are not finite")
        if not torch.equal(tensor, expected[name].detach().to("cpu", tensor.dtype)):
            raise InputError(f"{where}: {name} differs from the trained matrix")
    if not any(tensor.any() for name, tensor in saved.items() if "lora_B" in name):
        raise InputError(f"{where}: every B matrix is still zero: the adapter has learned nothing")


def read_weights(folder) -> dict:
    """The tensors of an adapter folder by name, on the CPU.

    Raises:
        InputError: no adapter there, or an unreadable or empty one.
    """
    from peft import load_peft_weights

    folder = Path(folder)
    for name in ("adapter_config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: not an adapter folder: expected {name} in it")
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # safetensors raises its own kinds for a damaged header or body
        raise InputError(f"{folder / WEIGHTS}: cannot be read: {error}") from error
    if not weights:
        raise InputError(f"{folder / WEIGHTS}: holds no tensors")
    return weights


def load_adapter(model, folder):
    """`model` with the adapter of `folder` on it, for inference.

    Raises:
        InputError: the folder holds no adapter, or one made for another base.
    """
    from peft import PeftModel

    weights = read_weights(folder)
    try:
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=False)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: this adapter was not made for the base {model.name_or_path}: "
            f"{_first_line(error)}"
        ) from error
    _check_fits(adapted, weights, folder)
    return adapted.eval()


def _check_fits(adapted, weights: dict, folder) -> None:
    from peft import get_peft_model_state_dict

    missing = set(weights) ^ set(get_peft_model_state_dict(adapted))
    if missing:
        raise InputError(
            f"{folder}: this adapter was not made for this base: "
            f"{len(missing)} matrices fit no layer of it, first {min(missing)}"
        )


def _targets(model, wanted: list[str]) -> list[str]:
    """The names of the modules to adapt, spelled out: peft's own "all-linear" stores full paths,
    with which an adapter loads in silence on a base that has more layers.
    """
    import torch

    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    if wanted == ["all-linear"]:
        return sorted(linear - {"lm_head"})
    unknown = [name for name in wanted if name not in linear]
    if unknown:
        raise InputError(
            f"--lora_target_modules {' '.join(unknown)}: no such linear layer in the base; "
            f"it has {', '.join(sorted(linear))}"
        )
    return wanted


def _is_int8(model) -> bool:
    return getattr(model, "is_loaded_in_8bit", False)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]
