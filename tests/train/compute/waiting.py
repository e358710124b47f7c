"""Operators that wait for a card before the program goes on: each of them empties its queue."""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    *("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"),
    *("aten::nonzero", "aten::nonzero_numpy", "aten::masked_select"),
    *("aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"),
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
LIBRARIES = "/torch/", "/contextlib.py", __file__


class Waiting(TorchDispatchMode):
    """Counts them in `found`, by operator and by the function that asks for it.

    A CPU cannot tell copies to the host from others; values on the meta device refuse them.
    """

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0]
        if name in WAITING or name in INDEXING and by_mask(args):
            self.found[name, caller()] += 1
        return function(*args, **(kwargs or {}))


def by_mask(args) -> bool:
    """Whether an index is a mask, of which nobody knows how many rows it has."""
    indices = [one for one in tree_leaves(args[1]) if torch.is_tensor(one)]
    return any(index.dtype in (torch.bool, torch.uint8) for index in indices)


def caller() -> str:
    """The innermost function outside of torch: "file.py function"."""
    frame = sys._getframe(2)
    while frame and any(place in frame.f_code.co_filename for place in LIBRARIES):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name}" if frame else "?"
