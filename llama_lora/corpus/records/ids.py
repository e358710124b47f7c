"""Distinct ids for all conversations of a corpus, in little memory."""

from array import array
from hashlib import blake2b


class Ids:
    """Makes ids distinct: the second `a` becomes `a-2`.

    Only 8 bytes of each are held, since memory holds one for every conversation of a corpus. If two
    different ids share them, the second merely becomes `a-2` as well.
    """

    def __init__(self):
        self.used = UInt64Set()
        self.numbers: dict[str, int] = {}  # the last number given to an id that came again

    def distinct(self, name: str) -> str:
        if self.is_new(name):
            return name
        number = self.numbers.get(name, 1) + 1
        while not self.is_new(new := f"{name}-{number}"):
            number += 1
        self.numbers[name] = number
        return new

    def is_new(self, name: str) -> bool:
        """Whether `name` is new; from now on it is not."""
        return self.used.add(id_hash(name))


def id_hash(name: str) -> int:
    """8 bytes that stand for an id."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())


class UInt64Set:
    """A set of 64-bit numbers that takes 16 to 32 bytes for each; Python's takes a hundred."""

    def __init__(self):
        self.slots, self.count = array("Q", bytes(8 * 1024)), 0

    def add(self, number: int) -> bool:
        """Add `number`; whether it is new."""
        if 2 * self.count >= len(self.slots):
            self._grow()
        at = self._place(number)
        is_new = not self.slots[at]
        self.slots[at] = number or 1  # 0 is an empty slot
        self.count += is_new
        return is_new

    def _place(self, number: int) -> int:
        """Where `number` is, or the empty slot where it belongs."""
        number, last = number or 1, len(self.slots) - 1
        at = number & last
        while self.slots[at] not in (0, number):
            at = (at + 1) & last
        return at

    def _grow(self) -> None:
        old, self.slots = self.slots, array("Q", bytes(16 * len(self.slots)))
        for number in filter(None, old):
            self.slots[self._place(number)] = number
