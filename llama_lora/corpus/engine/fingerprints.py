"""Fingerprints of conversations that are set aside, in columns: a few bytes for each."""

from array import array
from dataclasses import dataclass

DIGEST = 16  # bytes


@dataclass
class Fingerprint:
    """What equal and similar conversations are recognized by, without their text.

    `digests` are `DIGEST` bytes for the text up to each answer and for the whole, one after the
    other; `signature` is as `near_duplicates.MinHasher` makes it, or nothing.
    """

    digests: bytes
    signature: bytes = b""


class Fingerprints:
    """The fingerprints and lengths in bytes of many conversations, by index."""

    def __init__(self):
        self.lengths, self.pairs, self.counts = array("I"), array("I"), array("I")
        self.digests, self.signatures = bytearray(), bytearray()

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, fingerprint: Fingerprint, length: int = 0, pairs: int = 0) -> None:
        self.lengths.append(length)
        self.pairs.append(pairs)
        self.counts.append(len(fingerprint.digests) // DIGEST)
        self.digests += fingerprint.digests
        self.signatures += fingerprint.signature

    def numbered(self) -> "Numbered":
        """The digests as numbers, equal where the texts are equal."""
        import numpy as np

        counts = np.frombuffer(self.counts, np.uint32)
        _, numbers = np.unique(np.frombuffer(self.digests, f"V{DIGEST}"), return_inverse=True)
        owners = np.repeat(np.arange(len(counts)), counts)
        ends = np.cumsum(counts, dtype=np.int64) - 1
        whole = numbers[ends]
        goes_on = numbers != whole[owners]
        return Numbered(whole, numbers[goes_on], owners[goes_on])


class Numbered:
    """Which conversations are equal, and which continue which.

    `whole` has the number of each conversation's text; `begins` has the numbers of the texts that
    conversations continue, and `owners` the index of each continuing conversation.
    """

    def __init__(self, whole, begins, owners):
        self.whole, self.begins, self.owners = whole, begins, owners

    def first(self):
        """For each conversation, the index of the first one equal to it."""
        import numpy as np

        _, first, back = np.unique(self.whole, return_index=True, return_inverse=True)
        return first[back]

    def continued(self):
        """Pairs of indices: a conversation, and the first one with the text that it continues."""
        import numpy as np

        texts, first = np.unique(self.whole, return_index=True)
        at = np.searchsorted(texts, self.begins).clip(max=len(texts) - 1)
        found = texts[at] == self.begins
        return zip(self.owners[found].tolist(), first[at[found]].tolist(), strict=True)
