"""The tensors that a model folder stores, as safetensors or pickles, read one at a time."""

import json
import pickle
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zipfile import is_zipfile

from llama_lora.cli import InputError
from llama_lora.text import brief, named

PREFIX = "model."  # of all names but the output layer's; transformers also takes names without it
SAFETENSORS = ".safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FLOATS = "float16", "bfloat16", "float32"  # the dtypes of weights that are not quantized


@dataclass(frozen=True)
class _File:
    """A file as it was found; it counts as another one once it is rewritten."""

    path: Path
    changed: int
    size: int

    @classmethod
    def at(cls, path: Path):
        try:
            found = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {brief(error)}") from error
        return cls(path, found.st_mtime_ns, found.st_size)


# Many parts of a run look at the base: what is found is kept as long as the files stay the same.
_EQUAL: dict[tuple, bool] = {}


@cache
def _headers(file: _File) -> dict:
    return {name: tensor.to("meta") for name, tensor in _tensors(file.path).items()}


class StoredTensors:
    """The tensors of a model folder by name; they stay on disk until asked for.

    Attributes:
        headers: every tensor on the meta device, for its shape and dtype; empty if the folder has
            no weights.
    """

    def __init__(self, folder):
        """Read the headers.

        Raises:
            InputError: a file cannot be read or holds more than tensors, or a tensor is stored
                twice, with the prefix and without.
        """
        self._in_memory: tuple[Path | None, dict] = None, {}
        self._files, self.headers = {}, {}
        for file in map(_File.at, _files(Path(folder))):
            headers = _headers(file)
            self._files |= dict.fromkeys(headers, file)
            self.headers |= headers
        twice = {name for name in self.headers if PREFIX + name in self.headers}
        if twice:
            raise InputError(
                f'{folder}: found {named(twice)} twice, with "{PREFIX}" before the name and '
                "without: remove one of them"
            )

    def name_of(self, parameter: str) -> str | None:
        """The name a parameter is stored under, with or without the prefix; None if it is not."""
        names = parameter, parameter.removeprefix(PREFIX), PREFIX + parameter
        return next((name for name in names if name in self.headers), None)

    def load(self, name: str):
        """The tensor `name`. Its memory is the file's, and goes when it does.

        Raises:
            InputError: its file cannot be read.
        """
        path = self._files[name].path
        if self._in_memory[0] == path:
            return self._in_memory[1][name]
        # Reopened each time: an open file keeps every page that was read from it.
        tensors = _tensors(path, [name])
        if path.suffix != SAFETENSORS and not is_zipfile(path):  # read, not mapped
            self._in_memory = path, tensors
        return tensors[name]

    def equal(self, first: str, second: str) -> bool:
        """Whether the tensors of these names have the same dtype and values.

        Raises:
            InputError: one of their files cannot be read.
        """
        import torch

        compared = tuple((self._files[name], name) for name in (first, second))
        if compared not in _EQUAL:
            one, other = map(self.load, (first, second))
            _EQUAL[compared] = one.dtype == other.dtype and torch.equal(one, other)
        return _EQUAL[compared]


def _tensors(path: Path, names: list[str] | None = None) -> dict:
    """Those tensors of a file, or all of them; a pickle always gives all."""
    from safetensors import safe_open

    if path.suffix != SAFETENSORS:
        return _pickled(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}
    except Exception as error:  # safetensors raises its own errors, and Rust's
        raise InputError(f"{path}: cannot be read: {brief(error)}") from error


def _pickled(path: Path) -> dict:
    """All tensors of a pickle: files of torch 1.6 and later are mapped, older ones read."""
    import torch

    try:
        mapped = is_zipfile(path) or None
        tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        raise not_only_tensors(path, error) from error
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path}: cannot be read: {brief(error)}") from error
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise InputError(f"{path}: expected tensors by name, found something else")
    return tensors


def not_only_tensors(path: Path, error: pickle.UnpicklingError) -> InputError:
    """What to say about a pickle that torch cannot load as tensors alone."""
    forbidden = re.search(r"GLOBAL (\S+)", str(error))
    found = f"the code {forbidden[1]}" if forbidden else "another pickle"
    return InputError(f"{path}: not loaded: expected tensors alone, found {found}")


def _files(folder: Path) -> list[Path]:
    """The files that transformers loads the model in `folder` from, if any."""
    for name, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index).is_file():
            return _shards(folder / index)
    return []


def _shards(index: Path) -> list[Path]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        found["metadata"]  # transformers needs it, and all scripts should take the same folders
        names = set(found["weight_map"].values())
        return [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of weights: {error}") from error
