"""The tensors that a model folder stores, in safetensors or pickled, read one at a time."""

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from zipfile import is_zipfile

from llama_lora.cli import InputError
from llama_lora.text import brief

PREFIX = "model."  # of all but the output layer; transformers takes names without it as well
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Stored:
    """The tensors of a model folder by name, which stay on disk until asked for.

    Attributes:
        files: of each tensor the file that holds it; none where the folder has no weights.
    """

    def __init__(self, folder):
        """Raises `InputError`: a file that cannot be read, or that holds other than tensors."""
        self._in_memory: tuple[Path | None, dict] = None, {}
        self.files = {name: path for path in _files(Path(folder)) for name in self._tensors(path)}

    def name_of(self, parameter: str) -> str | None:
        """The name under which a parameter is stored, if it is: with or without the prefix."""
        names = parameter, parameter.removeprefix(PREFIX), PREFIX + parameter
        return next((name for name in names if name in self.files), None)

    def load(self, name: str):
        """The tensor `name`. Its memory is the file's, and goes when it does."""
        # Opened again each time: an open file keeps every page that was read of it.
        return self._tensors(self.files[name], [name])[name]

    def headers(self) -> Iterator[tuple[str, object]]:
        """Every name with its tensor, of which no values are read as long as nobody asks."""
        for path in dict.fromkeys(self.files.values()):
            yield from self._tensors(path).items()

    def _tensors(self, path: Path, names: list[str] | None = None) -> dict:
        from safetensors import safe_open

        if path.suffix != ".safetensors":
            return self._pickled(path)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names or file.keys()}
        except Exception as error:  # safetensors raises its own kinds, and Rust's
            raise InputError(f"{path}: cannot be read: {brief(error)}") from error

    def _pickled(self, path: Path) -> dict:
        """All tensors of a pickle: those of torch 1.6 and later are mapped, older ones read."""
        import torch

        if self._in_memory[0] == path:
            return self._in_memory[1]
        try:
            mapped = is_zipfile(path)
            tensors = torch.load(path, map_location="cpu", mmap=mapped or None, weights_only=True)
        except pickle.UnpicklingError as error:
            raise not_only_tensors(path, error) from error
        except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
            raise InputError(f"{path}: cannot be read: {brief(error)}") from error
        if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
            raise InputError(f"{path}: expected tensors by name, found something else")
        if not mapped:
            self._in_memory = path, tensors
        return tensors


def not_only_tensors(path: Path, error: pickle.UnpicklingError) -> InputError:
    """What to say of a pickle that torch has not loaded as tensors alone."""
    forbidden = re.search(r"GLOBAL (\S+)", str(error))
    found = f"the code {forbidden[1]}" if forbidden else "another pickle"
    return InputError(f"{path}: not loaded: expected tensors alone, found {found}")


def _files(folder: Path) -> list[Path]:
    """The files that transformers loads the model in `folder` from; none if it has none."""
    for name, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index).is_file():
            return _shards(folder / index)
    return []


def _shards(index: Path) -> list[Path]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        found["metadata"]  # transformers wants it, and all scripts are to take the same folders
        names = set(found["weight_map"].values())
        return [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of weights: {error}") from error
