"""Where a stage puts its conversations: straight into the output, or aside until all are read."""

import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from llama_lora.corpus.engine.account import Account
from llama_lora.corpus.engine.fingerprints import Fingerprint, Fingerprints
from llama_lora.corpus.records.atomic_files import Outputs, Writer
from llama_lora.corpus.records.conversation import Turn
from llama_lora.corpus.records.ids import Ids
from llama_lora.corpus.records.json_values import dump, parse


@dataclass
class Line:
    """A conversation as it is written to the output, after its id."""

    id: str
    body: bytes
    pairs: int
    fingerprint: Fingerprint | None  # only if an arranger needs it


@dataclass
class Dropped:
    """Why a stored conversation is rejected, and the index of the one kept in its place."""

    reason: str
    instead: int | None = None
    similarity: float = 1.0


@dataclass
class Arrangement:
    """Where stored conversations go: indices by output path, and the rejected ones by index."""

    outputs: dict[str, list[int]]
    rejected: dict[int, Dropped] = field(default_factory=dict)

    def stays(self, gone: Dropped) -> int | None:
        """The index of what is kept in place of a rejected one; a stand-in may be rejected, too."""
        while (index := gone.instead) in self.rejected:
            gone = self.rejected[index]
        return index


class Arranger(Protocol):
    """Decides where stored conversations go.

    `fingerprinter` makes, in each worker, the function that computes the fingerprint of turns. The
    call gets the fingerprints of all stored conversations.
    """

    def fingerprinter(self) -> Callable[[list[Turn]], Fingerprint]: ...

    def __call__(self, fingerprints: Fingerprints) -> Arrangement: ...


class DirectOutput:
    """Writes lines as they come."""

    def __init__(self, out: Writer, account: Account):
        self.out, self.account, self.ids = out, account, Ids()

    def put(self, line: Line) -> None:
        write_line(self.out, line.id, line.body, self.ids, self.account)


def write_line(out: Writer, name: str, body: bytes, ids: Ids, account: Account) -> str:
    """Write the conversation under an id that no other has; returns the id."""
    new = ids.distinct(name)
    account.repairs["equal ids"] += new != name
    out.write(b'{"id":' + dump(new) + body)
    return new


class SpooledOutput:
    """Keeps lines in a scratch file until it is known where each one goes."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.fingerprints = Fingerprints()
        self.ends = array("Q", [0])  # in the file

    def put(self, line: Line) -> None:
        item = dump(line.id) + line.body
        self.file.write(item)
        self.ends.append(self.ends[-1] + len(item))
        self.fingerprints.add(line.fingerprint, len(line.body), line.pairs)

    def arrange(
        self, arrange: Arranger, path, out, rejects, account, outputs: Outputs
    ) -> list[str]:
        """Write every stored conversation where `arrange` puts it; returns the output paths."""
        self.file.flush()
        arrangement = arrange(self.fingerprints)
        wanted = {arrangement.stays(gone) for gone in arrangement.rejected.values()}
        ids, names = Ids(), {}
        for target, order in arrangement.outputs.items():
            writer = out if target == path else outputs.corpus(target)
            for index in order:
                name = write_line(writer, *self.item(index), ids, account)
                if index in wanted:
                    names[index] = name
            if target != path:
                account.seen["held out"] += len(order)
        for index, gone in arrangement.rejected.items():
            account.turn_away(self.fingerprints.pairs[index], gone.reason)
            if rejects:
                about = {"reason": gone.reason, "detail": ""}
                if gone.instead is not None:
                    kept = names[arrangement.stays(gone)]
                    about |= {"detail": f"kept: {kept}", "similarity": gone.similarity}
                name, body = self.item(index)
                start = dump(about)[:-1] + b',"conversation":{"id":'
                rejects.write(start + dump(name) + body + b"}")
        return list(arrangement.outputs)

    def item(self, index: int) -> tuple[str, bytes]:
        """The id and the body of a line."""
        start, end = self.ends[index], self.ends[index + 1]
        item = os.pread(self.file.fileno(), end - start, start)
        cut = len(item) - self.fingerprints.lengths[index]
        return parse(item[:cut])[0], item[cut:]
