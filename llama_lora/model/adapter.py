"""Attach, save, verify and load a LoRA adapter (Hu et al. 2021) through peft."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

from llama_lora.cli import InputError, warn_once
from llama_lora.hardware.device import DTYPE_SWITCH, dtype_name
from llama_lora.model.folder import base_fingerprint, older_libraries
from llama_lora.model.folder.tensors import not_only_tensors
from llama_lora.model.template import has_tokenizer, load_template
from llama_lora.text import brief

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # of older tools
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LORA_A = re.compile(r"base_model\.model\.(.+)\.lora_A\.weight")


def attach(model, r: int, alpha: int, dropout: float, target_modules: list[str], **kinds):
    """Freeze `model` and add trainable LoRA matrices (fp32) to its target modules.

    Args:
        model: a base from `load_base`, in any precision. Unlike in peft's
            `prepare_model_for_kbit_training`, none of it is cast to fp32: norms compute in fp32
            anyway, and fp32 norm weights would make every activation fp32 too.
        target_modules: names such as `["q_proj", "v_proj"]`, or `["all-linear"]`.
        kinds: `use_dora` and `use_rslora` of peft's LoraConfig.

    Raises:
        InputError: the base lacks a target module.
    """
    from peft import LoraConfig, get_peft_model

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


def trainable(model) -> list[tuple]:
    """Names and parameters that training changes."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def save(model, template, folder, base_name: str | None = None) -> None:
    """Save a trained adapter with its tokenizer and chat template, then verify what was written.

    Args:
        base_name: as in `complete`.
    """
    model.save_pretrained(folder, safe_serialization=True)
    template.tokenizer.save_pretrained(folder)
    complete(folder, Path(model.name_or_path), base_name)
    verify(folder, model)


def complete(folder, base: Path, base_name: str | None = None) -> None:
    """Complete what peft has written, so that every reader can use it, even if the base moves.

    Args:
        base: the base's folder; some of its weights are kept, to recognize it by.
        base_name: the id on the Hub by which `adapter_config.json` names the base; if None, the
            base's absolute path.
    """
    config, weights = Path(folder, CONFIG), Path(folder, WEIGHTS)
    _name_base(config, base_name or os.path.abspath(base))
    older_libraries.amend(Path(folder))
    base_fingerprint.keep(weights, list(_adapted_layers(folder, _read_tensors(weights))), base)
    # safetensors makes files that only their owner may read.
    shutil.copymode(config, weights)


def _name_base(path: Path, name: str) -> None:
    # Only in the file: otherwise peft would look up an id's config on the Hub whenever it saves.
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = name
    path.write_text(json.dumps(settings), encoding="utf-8")


def verify(folder, model) -> None:
    """Check that the adapter in `folder` is the one trained on `model`, complete and loadable.

    As `read_weights`, and also that the file holds exactly the matrices of the target modules, with
    every value equal to the model's.

    Raises:
        InputError: names the first check that fails.
    """
    import torch
    from peft import get_peft_model_state_dict

    read_config(folder)
    saved, expected = read_weights(folder), get_peft_model_state_dict(model)
    where = Path(folder) / WEIGHTS
    if set(saved) != set(expected):
        differing = sorted(set(saved) ^ set(expected))
        raise InputError(
            f"{where}: expected the {len(expected)} matrices of the target modules, "
            f"found {len(saved)}; first difference: {differing[0]}"
        )
    for name, tensor in saved.items():
        if not torch.equal(tensor, expected[name].detach().to("cpu", tensor.dtype)):
            raise InputError(f"{where}: {name} differs from the trained matrix")


def read_config(folder):
    """The peft `LoraConfig` of an adapter folder.

    Raises:
        InputError: there is none, or it is of another kind.
    """
    from peft import PeftConfig

    path = Path(folder) / CONFIG
    if not path.is_file():
        raise InputError(f"{folder}: not an adapter folder: expected {CONFIG} in it")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not an adapter's config: {brief(error)}") from error
    if config.peft_type != "LORA":
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise InputError(f"{path}: expected a LoRA adapter, found {kind}")
    return config


def read_weights(folder) -> dict:
    """The tensors of an adapter folder by name, on the CPU; no code in it is unpickled.

    Raises:
        InputError: there is no adapter; or it is unreadable, empty or not finite, or changes
            nothing because every B matrix is zero.
    """
    import torch

    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: not an adapter folder: expected {CONFIG} in it")
    path = next((folder / name for name in (WEIGHTS, PICKLED) if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: not an adapter folder: expected {WEIGHTS} in it")
    weights = _read_tensors(path)
    if not weights:
        raise InputError(f"{path}: holds no tensors")
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} holds values that are not finite")
    if not any(tensor.any() for name, tensor in weights.items() if "lora_B" in name):
        raise InputError(f"{path}: every B matrix is still zero: the adapter has learned nothing")
    return weights


def _read_tensors(path: Path) -> dict:
    import torch
    from peft import load_peft_weights

    try:
        weights = load_peft_weights(str(path.parent), device="cpu")
    except pickle.UnpicklingError as error:
        raise not_only_tensors(path, error) from error
    except Exception as error:  # safetensors raises its own errors for a damaged header or body
        raise InputError(f"{path}: cannot be read: {brief(error)}") from error
    tensors = isinstance(weights, dict) and all(map(torch.is_tensor, weights.values()))
    if not tensors:
        raise InputError(f"{path}: expected a dictionary of tensors, found something else")
    return weights


def load_adapter(model, folder, weights: dict, name: str = "default"):
    """`model` with the adapter in `folder` on it, for inference.

    Its matrices are in the base's compute dtype, so that nothing is cast for their products. Those
    of DoRA are in fp32: its magnitudes differ from the lengths of the base's rows by less than 16
    bits can tell.

    Args:
        model: a base that the adapter fits (`check_fits`); other adapters may already be on it.
        weights: the result of `read_weights` for `folder`.
        name: the adapter's name in peft.

    Raises:
        InputError: the adapter was made for another base, or overflows in its dtype.
    """
    from peft import PeftModel, get_peft_model_state_dict

    in_fp32 = read_config(folder).use_dora
    if not in_fp32:
        _check_range(folder, weights, model.dtype)
    # peft's own cast is to fp32.
    kinds = {"is_trainable": False, "autocast_adapter_dtype": in_fp32}
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name, **kinds)
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(model, folder, name, **kinds)
    except (RuntimeError, ValueError, KeyError) as error:
        raise _misfit(folder, model, brief(error)) from error
    # Otherwise peft would look for the config of the base that the adapter names, even on the Hub.
    adapted.peft_config[name].base_model_name_or_path = model.name_or_path
    if differing := set(weights) ^ set(get_peft_model_state_dict(adapted, adapter_name=name)):
        problem = f"{len(differing)} matrices fit none of its layers, first {min(differing)}"
        raise _misfit(folder, model, problem)
    if not in_fp32:
        _cast_matrices(adapted, name)
    return adapted.eval()


def _check_range(folder, weights: dict, dtype) -> None:
    """Raise `InputError` that names the first of `weights` that overflows in `dtype`."""
    for name, tensor in weights.items():
        if not tensor.to(dtype).isfinite().all():
            largest = tensor.abs().max().item()
            raise InputError(
                f"{folder}: {name} holds {largest:.6g}, which overflows in {dtype_name(dtype)}; "
                f"{DTYPE_SWITCH}=float32 computes with it"
            )


def _cast_matrices(model, name: str) -> None:
    """Cast the matrices of the adapter `name` to the base's dtype.

    peft does so itself where the base's weights are floating-point numbers, and leaves them in the
    file's dtype beside quantized ones.
    """
    for parameter, matrix in model.named_parameters():
        if re.search(rf"\.lora_[AB]\.{re.escape(name)}\.", parameter):
            matrix.data = matrix.data.to(model.dtype)


def check_fits(folder, weights: dict, model) -> None:
    """Check that the adapter in `folder`, with these `weights`, was made for a base like `model`.

    Layers, shapes and vocabulary must be the same. A base with other weights is used after a
    warning. If the adapter has no record of its base's weights, so is a base with another name.

    Args:
        model: the base in any precision, or on the meta device, where it takes no memory.

    Raises:
        InputError: names the first difference: what the adapter expects, and what the base has.
    """
    config = read_config(folder)
    _check_layers(folder, config, weights, model)
    _check_vocabulary(folder, model)
    trained_on, base = config.base_model_name_or_path or "", model.name_or_path
    same = base_fingerprint.same(Path(folder) / WEIGHTS, Path(base))
    if same is False:
        warn_once(f"({folder} was trained on {trained_on}; the weights in {base} differ)")
    elif same is None and trained_on and base and Path(trained_on).name != Path(base).name:
        warn_once(f"({folder} was trained on {trained_on}; the base here is {base})")


def _check_layers(folder, config, weights: dict, model) -> None:
    import torch
    from peft.tuners.tuners_utils import check_target_module_exists

    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    adapted = _adapted_layers(folder, weights)
    fitting = {name for name in shapes if check_target_module_exists(config, name)}
    if set(adapted) != fitting:
        raise _misfit(folder, model, _difference(adapted, shapes, fitting))
    for name, (_, expected) in adapted.items():
        if expected != shapes[name]:
            found = " × ".join(map(str, shapes[name]))
            wanted = " × ".join(map(str, expected))
            raise _misfit(folder, model, f"expected {name} of {wanted}, found {found}")


def _adapted_layers(folder, weights: dict) -> dict[str, tuple[int, tuple[int, int]]]:
    """For each linear layer that the adapter changes: the rank, and the layer's (out, in)."""
    layers = {}
    for key, a in weights.items():
        if not (match := LORA_A.fullmatch(key)):
            continue
        b = weights.get(key.replace(".lora_A.", ".lora_B."))
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise InputError(f"{folder}: expected a B matrix that fits {key}, found none")
        layers[match[1]] = a.shape[0], (b.shape[0], a.shape[1])
    return layers


def _difference(adapted, shapes, fitting) -> str:
    """How the layers that an adapter was made for differ from those it would change here."""

    def count(names) -> int:
        numbers = (re.search(r"\.layers\.(\d+)\.", name) for name in names)
        return max((int(number[1]) + 1 for number in numbers if number), default=0)

    def kinds(names) -> list[str]:
        return sorted({name.rpartition(".")[2] for name in names})

    if unknown := sorted(set(kinds(adapted)) - set(kinds(shapes))):
        return f"expected layers named {', '.join(unknown)}, found {', '.join(kinds(shapes))}"
    if count(adapted) != count(fitting):
        return f"expected {count(adapted)} layers, found {count(fitting)}"
    first = min(set(adapted) ^ fitting)
    return (
        f"expected {len(adapted)} layers to adapt, found {len(fitting)}, first difference: {first}"
    )


def _check_vocabulary(folder, model) -> None:
    """Compare the tokenizer in the adapter's folder, if any, with the base's."""
    from tokenizers import Tokenizer

    own, base = (Path(place) / "tokenizer.json" for place in (folder, model.name_or_path))
    if not own.is_file():
        return
    tokens = Tokenizer.from_file(str(own)).get_vocab(with_added_tokens=True)
    rows = model.get_input_embeddings().weight.shape[0]
    # A token that nothing uses needs no row; a padding token added to Llama 2 has none.
    if len(tokens) > rows and not (
        has_tokenizer(folder) and load_template(folder).highest_id < rows
    ):
        raise _misfit(folder, model, f"expected a vocabulary of {len(tokens):,}, found {rows:,}")
    if not base.is_file() or base.read_bytes() == own.read_bytes():
        return
    theirs = {
        id: token
        for token, id in Tokenizer.from_file(str(base)).get_vocab(with_added_tokens=True).items()
    }
    for token, id in sorted(tokens.items(), key=lambda item: item[1]):
        if theirs.get(id, token) != token:
            problem = f"expected token {id} to be {token!r}, found {theirs[id]!r}"
            raise _misfit(folder, model, problem)


def _misfit(folder, model, problem: str) -> InputError:
    return InputError(
        f"{folder}: this adapter was not made for the base {model.name_or_path}: {problem}"
    )


def _targets(model, wanted: list[str]) -> list[str]:
    """The names of the modules to adapt, spelled out.

    peft's own "all-linear" stores full paths; such an adapter loads silently on a base with more
    layers.
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
