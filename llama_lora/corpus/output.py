"""Where a stage puts its conversations: straight into the output, or aside until all are known."""

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field

from llama_lora.corpus import files
from llama_lora.corpus.account import Account


@dataclass
class Line:
    """A conversation as it will stand in the output, after its id."""

    id: str
    body: bytes
    pairs: int
    digests: list[bytes]  # up to each answer, last the whole; only where they are asked for


@dataclass
class Stored:
    """A `Line` that waits in the spool to be put in its place."""

    id: str
    offset: int
    length: int
    pairs: int
    digests: list[bytes]

    @property
    def digest(self) -> bytes:
        """Equal for equal conversations."""
        return self.digests[-1]


@dataclass
class Arrangement:
    """Which of the stored conversations go where: indices by output path, reasons by index."""

    outputs: dict[str, list[int]]
    rejected: dict[int, str] = field(default_factory=dict)


class Ids:
    """Makes ids distinct: the second `a` becomes `a-2`."""

    def __init__(self):
        self.used: dict[str, int] = {}

    def distinct(self, name: str) -> str:
        if name not in self.used:
            self.used[name] = 1
            return name
        while (new := f"{name}-{self.used[name] + 1}") in self.used:
            self.used[name] += 1
        self.used[name] += 1
        self.used[new] = 1
        return new


class Direct:
    """Writes lines as they come."""

    def __init__(self, out: files.Writer, account: Account):
        self.out, self.account, self.ids = out, account, Ids()

    def put(self, line: Line) -> None:
        write_line(self.out, line.id, line.body, self.ids, self.account)


def write_line(out: files.Writer, name: str, body: bytes, ids: Ids, account: Account) -> None:
    """Write the conversation under an id that no other has."""
    new = ids.distinct(name)
    account.repairs["equal ids"] += new != name
    out.write(b'{"id":' + files.dump(new) + body)


class Spool:
    """Keeps lines in a nameless file beside the output until it is known where each goes."""

    def __init__(self, path: str, stack: ExitStack):
        folder = os.path.dirname(os.path.realpath(path))
        spool = tempfile.TemporaryFile(dir=folder, buffering=files.BLOCK)  # noqa: SIM115
        self.file = stack.enter_context(spool)
        self.stored: list[Stored] = []
        self.offset = 0

    def put(self, line: Line) -> None:
        self.file.write(line.body)
        size = len(line.body)
        self.stored.append(Stored(line.id, self.offset, size, line.pairs, line.digests))
        self.offset += size

    def arrange(self, arrangement, path, out, rejects, account, stack) -> None:
        """Write every stored conversation where `arrangement` puts it."""
        self.file.flush()
        ids = Ids()
        for target, order in arrangement.outputs.items():
            writer = out if target == path else stack.enter_context(files.writing(target))
            for stored in map(self.stored.__getitem__, order):
                write_line(writer, stored.id, self.body(stored), ids, account)
            if target != path:
                account.seen["held out"] += len(order)
        for index, reason in arrangement.rejected.items():
            stored = self.stored[index]
            account.turn_away(stored.pairs, reason)
            if rejects:
                about = files.dump({"reason": reason})[:-1] + b',"conversation":{"id":'
                rejects.write(about + files.dump(stored.id) + self.body(stored) + b"}")

    def body(self, stored: Stored) -> bytes:
        return os.pread(self.file.fileno(), stored.length, stored.offset)
