"""The tensors of a Hugging Face folder, read one at a time."""

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from llama_lora.cli import InputError
from llama_lora.model.base import check_folder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class FolderWeights:
    """The parameters of a model folder, which stay on disk until asked for.

    Attributes:
        folder: where they lie.
        model: the model on the meta device, which has names and shapes but no values.
        shapes: of every parameter by name, tied ones once.
        dtype: the stored type of most values, or float16 for float32: what `--dtype auto` means.
    """

    def __init__(self, folder: Path):
        """Raises `InputError`: no unquantized safetensors there that fit the folder's config."""
        check_folder(folder)
        self.folder = folder
        self.model = _without_values(folder)
        self.shapes = {
            name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()
        }
        self._files = _files(folder)
        self.dtype = self._check()

    @property
    def config(self):
        return self.model.config

    def load(self, name: str) -> torch.Tensor:
        """The parameter `name` as stored. Its memory is the file's, and goes when it does."""
        # Opened again each time: an open file keeps every page that was read of it.
        with self._open(self._files[name]) as file:
            return file.get_tensor(name)

    def _open(self, path: Path):
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error

    def _check(self) -> torch.dtype:
        """Look at every tensor's type and shape; return the type to keep."""
        stored = {}
        for path in sorted({self._files[name] for name in self.shapes if name in self._files}):
            with self._open(path) as file:
                for name in file.keys():  # noqa: SIM118  (not a dictionary)
                    if name in self.shapes:
                        stored[name] = self._check_one(path, name, file.get_slice(name))
        for name in self.shapes:
            if name not in stored:
                raise InputError(f"{self.folder}: expected the tensor {name}, found none")
        dtype = FLOATS[Counter(stored.values()).most_common(1)[0][0]]
        return torch.float16 if dtype == torch.float32 else dtype

    def _check_one(self, path: Path, name: str, stored) -> str:
        if stored.get_dtype() not in FLOATS:
            raise InputError(
                f"{path}: expected {name} in {', '.join(FLOATS)}, found {stored.get_dtype()}"
            )
        if tuple(stored.get_shape()) != self.shapes[name]:
            raise InputError(
                f"{path}: expected {name} of shape {self.shapes[name]}, found "
                f"{tuple(stored.get_shape())}"
            )
        return stored.get_dtype()


def _without_values(folder: Path):
    """The model that `folder` holds, on the meta device."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if quantized := getattr(config, "quantization_config", None):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else "some way"
            raise InputError(
                f"{folder}: expected 16-bit weights, found weights quantized with {method}; use "
                "the base that they were made from"
            )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: this model cannot be loaded: {error}") from error


def _files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    if (index := folder / INDEX).is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not an index of weights: {error}") from error
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{folder}: expected {WEIGHTS} or {INDEX} in it, found neither")
    try:
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
