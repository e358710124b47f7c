"""Where a stage puts its conversations: straight into the output, or aside until all are known."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import BinaryIO, Protocol

from llama_lora.corpus import files
from llama_lora.corpus.account import Account
from llama_lora.corpus.atomic import Outputs, Writer
from llama_lora.corpus.conversation import Turn

DIGEST = 16  # bytes


@dataclass
class Marks:
    """What tells equal conversations, and alike ones, without their text.

    `digests` are `DIGEST` bytes up to each answer and for the whole, one after the other;
    `signature` is as `near.Signer` makes it, or nothing.
    """

    digests: bytes
    signature: bytes = b""


@dataclass
class Line:
    """A conversation as it will stand in the output, after its id."""

    id: str
    body: bytes
    pairs: int
    marks: Marks | None  # only where they are asked for


@dataclass(slots=True)
class Stored:
    """A `Line` that waits in the spool to be put in its place."""

    id: str
    offset: int
    length: int
    pairs: int
    digests: bytes  # in one piece: there is one of these for every conversation of a corpus

    @property
    def digest(self) -> bytes:
        """Equal for equal conversations."""
        return self.digests[-DIGEST:]

    def beginnings(self) -> list[bytes]:
        """The digests of what it goes on from."""
        ends = range(DIGEST, len(self.digests), DIGEST)
        return [part for end in ends if (part := self.digests[end - DIGEST : end]) != self.digest]


@dataclass
class Gone:
    """Why a stored conversation is rejected, and the index of the one that stays in its place."""

    reason: str
    instead: int | None = None
    similarity: float = 1.0


@dataclass
class Arrangement:
    """Which of the stored conversations go where: indices by output path; what goes, by index."""

    outputs: dict[str, list[int]]
    rejected: dict[int, Gone] = field(default_factory=dict)

    def stays(self, gone: Gone) -> int | None:
        """The index of what is kept in place of one that goes; a stand-in may go for another."""
        while (index := gone.instead) in self.rejected:
            gone = self.rejected[index]
        return index


class Arrange(Protocol):
    """Decides where stored conversations go.

    `marker` makes, in each worker, the function that marks turns. The call is given all that is
    stored and the signatures of all, one after the other.
    """

    def marker(self) -> Callable[[list[Turn]], Marks]: ...

    def __call__(self, stored: list[Stored], signatures: bytes) -> Arrangement: ...


class Ids:
    """Makes ids distinct: the second `a` becomes `a-2`.

    Of each only 8 bytes are held, for there is one in memory for every conversation of a corpus.
    That two ids share those would do no more than to make one of them `a-2` as well.
    """

    def __init__(self):
        self.used: set[int] = set()
        self.numbers: dict[str, int] = {}  # the last one given to an id that came again

    def distinct(self, name: str) -> str:
        if self.is_new(name):
            return name
        number = self.numbers.get(name, 1) + 1
        while not self.is_new(new := f"{name}-{number}"):
            number += 1
        self.numbers[name] = number
        return new

    def is_new(self, name: str) -> bool:
        """Whether `name` was not used before; it is from now on."""
        short = int.from_bytes(blake2b(name.encode(), digest_size=8).digest())
        before = len(self.used)
        self.used.add(short)
        return len(self.used) > before


class Direct:
    """Writes lines as they come."""

    def __init__(self, out: Writer, account: Account):
        self.out, self.account, self.ids = out, account, Ids()

    def put(self, line: Line) -> None:
        write_line(self.out, line.id, line.body, self.ids, self.account)


def write_line(out: Writer, name: str, body: bytes, ids: Ids, account: Account) -> str:
    """Write the conversation under an id that no other has; the id."""
    new = ids.distinct(name)
    account.repairs["equal ids"] += new != name
    out.write(b'{"id":' + files.dump(new) + body)
    return new


class Spool:
    """Keeps lines in a scratch file until it is known where each goes."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.stored: list[Stored] = []
        self.signatures = bytearray()
        self.offset = 0

    def put(self, line: Line) -> None:
        self.file.write(line.body)
        size = len(line.body)
        self.stored.append(Stored(line.id, self.offset, size, line.pairs, line.marks.digests))
        self.signatures += line.marks.signature
        self.offset += size

    def arrange(self, arrange: Arrange, path, out, rejects, account, outputs: Outputs) -> None:
        """Write every stored conversation where `arrange` puts it."""
        self.file.flush()
        arrangement = arrange(self.stored, self.signatures)
        ids, names = Ids(), [""] * len(self.stored)
        for target, order in arrangement.outputs.items():
            writer = out if target == path else outputs.corpus(target)
            for index in order:
                stored = self.stored[index]
                names[index] = write_line(writer, stored.id, self.body(stored), ids, account)
            if target != path:
                account.seen["held out"] += len(order)
        for index, gone in arrangement.rejected.items():
            stored = self.stored[index]
            account.turn_away(stored.pairs, gone.reason)
            if rejects:
                about = {"reason": gone.reason, "detail": ""}
                if gone.instead is not None:
                    kept = names[arrangement.stays(gone)]
                    about |= {"detail": f"kept: {kept}", "similarity": gone.similarity}
                start = files.dump(about)[:-1] + b',"conversation":{"id":'
                rejects.write(start + files.dump(stored.id) + self.body(stored) + b"}")

    def body(self, stored: Stored) -> bytes:
        return os.pread(self.file.fileno(), stored.length, stored.offset)
