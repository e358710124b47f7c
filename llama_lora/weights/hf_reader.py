"""The parameters of a model by name, read one at a time from its Hugging Face folder."""

from collections import Counter
from pathlib import Path

import torch
from transformers.utils.loading_report import LoadStateDictInfo

from llama_lora.cli import InputError
from llama_lora.model.base import check_complete
from llama_lora.model.folder.config import load_config, quantized_as, without_values
from llama_lora.model.folder.tensors import INDEX, PICKLED, WEIGHTS, StoredTensors


class FolderWeights:
    """The parameters of a model folder, which stay on disk until asked for.

    Attributes:
        folder: where they are.
        model: the model on the meta device, with names and shapes but no values.
        shapes: of every parameter by name, tied ones once.
        dtype: the stored type of most values, or float16 for float32: what `--dtype auto` means.
    """

    def __init__(self, folder: Path):
        """Raises `InputError` if the folder has no unquantized weights that fit its config."""
        self.folder = folder
        self.model = _unquantized(folder)
        self.shapes = {
            name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()
        }
        self._stored = StoredTensors(folder)
        if not self._stored.headers:
            raise InputError(
                f"{folder}: expected {WEIGHTS} or {INDEX} in it, or {PICKLED}, found none"
            )
        self._names = self._stored_names()
        self.dtype = self._check()

    @property
    def config(self):
        return self.model.config

    def load(self, name: str) -> torch.Tensor:
        """The parameter `name` as stored. Its memory is the file's, and goes when it does."""
        return self._stored.load(self._names[name])

    def _stored_names(self) -> dict[str, str]:
        """The name under which each parameter is stored; of tied ones, either may be."""
        twins = {source: target for target, source in self.model.all_tied_weights_keys.items()}
        names = {
            name: self._stored.name_of(name) or self._stored.name_of(twins.get(name, name))
            for name in self.shapes
        }
        return {name: stored for name, stored in names.items() if stored}

    def _check(self) -> torch.dtype:
        """Check every tensor's shape; returns the dtype to keep."""
        headers = self._stored.headers
        shapes = {name: tuple(headers[stored].shape) for name, stored in self._names.items()}
        known = {self._stored.name_of(name) for name in self.model.state_dict()}
        found = LoadStateDictInfo(
            missing_keys=self.shapes.keys() - self._names.keys(),
            unexpected_keys=headers.keys() - known,
            mismatched_keys={
                (name, shape, self.shapes[name])
                for name, shape in shapes.items()
                if shape != self.shapes[name]
            },
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )
        self.model._adjust_missing_and_unexpected_keys(found)  # by names that transformers ignores
        check_complete(self.folder, self.model, **found.to_dict())
        dtypes = Counter(headers[stored].dtype for stored in self._names.values())
        dtype = dtypes.most_common(1)[0][0]
        return torch.float16 if dtype == torch.float32 else dtype


def _unquantized(folder: Path):
    """The model in `folder`, without values; raises `InputError` if it is quantized."""
    if quantized_as(folder):
        raise InputError(
            f"{folder}: expected 16-bit weights, found weights quantized with bitsandbytes; use "
            "the base that they were made from"
        )
    config = load_config(folder)
    try:
        return without_values(config)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise InputError(f"{folder}: this model cannot be loaded: {error}") from error
