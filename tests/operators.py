"""Which operators a computation runs, and what it copies."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

COPIES = "aten::cat", "aten::clone", "aten::copy_", "aten::index_copy_"


class Counted(TorchDispatchMode):
    """Counts the operators that run under it by `names`, and the bytes that they have `copied`.

    Those made of others are counted as these; in inference mode, torch leaves them whole.
    """

    def __init__(self):
        super().__init__()
        self.names, self.copied = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            parts = function.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = function(*args, **kwargs)
        name = function.name().partition(".")[0]
        self.names[name] += 1
        if name in COPIES:
            self.copied += result.numel() * result.itemsize
        return result
