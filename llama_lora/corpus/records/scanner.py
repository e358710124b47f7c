"""Cuts a corpus text into records by its brackets, without parsing it.

So one bad record stays one bad record, and other processes can do the parsing.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from llama_lora.corpus.records.json_values import dump, parse, parses

LONGEST = 64 << 20  # bytes of one record; a longer one was never closed
# bytes scanned at a time of a text that was put back: damage may put much back again and again
PIECE = 16 << 10
BLANK = b" \t\r\n"
OBJECT = b"{}"  # stands for any


class Damage(Exception):
    """The text is damaged from byte `offset` on.

    `rest` is the text read so far from the damaged record on, and `rest_offset` its place.
    """

    def __init__(self, offset: int, reason: str, rest: bytes = b"", rest_offset: int = 0):
        super().__init__(reason)
        self.offset, self.reason, self.rest, self.rest_offset = offset, reason, rest, rest_offset


class Item(NamedTuple):
    """The text of a record and its place; `lenient` if the commas before it are not valid JSON."""

    offset: int
    raw: bytes
    lenient: bool = False


class Blocks:
    """Text in blocks; what was taken too early can be put back.

    None ends between a backslash and what it escapes.
    """

    def __init__(self, blocks: Iterable[bytes]):
        self.blocks = iter(blocks)
        self.back: list[tuple[bytes, int]] = []  # texts, and where to start; the last comes first

    def __iter__(self) -> "Blocks":
        return self

    def __next__(self) -> bytes:
        if not self.back:
            return next(self.blocks)
        text, start = self.back.pop()
        piece = text[start : start + PIECE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = text[start : start + PIECE + 1]
        if start + len(piece) < len(text):
            self.back.append((text, start + len(piece)))
        return piece

    def put_back(self, text: bytes) -> None:
        if text:
            self.back.append((text, 0))


def array_items(blocks: Blocks, offset: int, strict: bool) -> Iterator[Item]:
    """The items of a JSON array whose text, after its opening bracket, is in `blocks`.

    With `strict`, an item that is not JSON is damage too. A comma may be missing, be doubled, or
    follow the last item. A bracket counts if the number of unescaped quotes before it is even. All
    this works on whole blocks, so Python never steps through the text. `depth` is the number of
    open brackets, including the array's own.
    """
    import numpy as np

    depth, inside, quote = 1, False, offset
    before, lenient = b"", False  # whether an object came before, and bad commas after it
    held: list[bytes] = []  # the text of earlier blocks from byte `start` on
    held_size, start = 0, offset
    for block in blocks:
        text = np.frombuffer(block, np.uint8)
        quotes = unescaped_quotes(text)
        lower = text | 0x20  # which makes braces of square brackets
        brackets = np.flatnonzero((lower == ord("{")) | (lower == ord("}")))
        brackets = brackets[(np.searchsorted(quotes, brackets) + inside) % 2 == 0]
        opening = lower[brackets] == ord("{")
        depths = depth + np.cumsum(np.where(opening, 1, -1))
        outer = np.flatnonzero(np.where(opening, depths == 2, depths <= 1))
        begin = 0
        for here, opens, level in zip(
            brackets[outer].tolist(), opening[outer].tolist(), depths[outer].tolist(), strict=True
        ):
            end = here if opens else here + 1  # an end belongs to what it closes
            found = b"".join([*held, block[begin:end]])
            if opens or level < 1:
                between = (found if opens else found[:-1]).strip(BLANK)
                try:
                    items, lenient = scalars(before, between, OBJECT if opens else b"")
                except ValueError:
                    what = between.strip(BLANK + b",")[:20].decode(errors="replace")
                    reason = f"expected an object, found {what!r}"
                    raise Damage(start, reason, found + block[end:], start) from None
                yield from (Item(start, item, lenient) for item in items)
            elif strict and not parses(found):
                raise Damage(start, "this is not JSON", found + block[end:], start)
            else:
                yield Item(start, found, lenient)
            if level < 1:
                blocks.put_back(block[end:])
                expect_end(blocks, offset + end)
                return
            held, held_size, begin, start, before = [], 0, end, offset + end, OBJECT
        if len(depths):
            depth = int(depths[-1])
        if len(quotes):
            quote = offset + int(quotes[-1])
        inside = (inside + len(quotes)) % 2 == 1
        held.append(block[begin:])
        held_size += len(block) - begin
        offset += len(block)
        if held_size > LONGEST:
            reason = f"it does not end within {LONGEST >> 20} MB"
            raise Damage(start, reason, b"".join(held), start)
    what = "a string" if inside else "an object" if depth > 1 else "the array"
    at = quote if inside else offset
    raise Damage(at, f"the file ends inside {what}", b"".join(held), start)


def unescaped_quotes(text):
    """Where `text`, an array of bytes, has quotes that begin or end a string."""
    import numpy as np

    is_quote = text == ord('"')
    slashes = np.flatnonzero(text == ord("\\"))
    # The first, third, … of a run of backslashes escapes what follows it.
    run_starts = np.where(np.diff(slashes, prepend=-2) > 1, slashes, 0)
    escaping = slashes[(slashes - np.maximum.accumulate(run_starts)) % 2 == 0]
    # A text may end in a backslash; no quote stands there.
    is_quote[np.minimum(escaping + 1, len(text) - 1)] = False
    return np.flatnonzero(is_quote)


def scalars(before: bytes, text: bytes, after: bytes) -> tuple[list[bytes], bool]:
    """The items in the text between two objects of an array, and whether its commas are invalid.

    `before` and `after` are `OBJECT`, or nothing at the ends of the array.
    """
    if text == (b"," if before and after else b""):
        return [], False
    try:
        items = parse(b"[" + before + text + after + b"]")[0]
        items, lenient = items[bool(before) : len(items) - bool(after)], False
    except ValueError:
        items, lenient = parse(b"[" + text.strip(BLANK + b",") + b"]")[0], True
    return list(map(dump, items)), lenient


def expect_end(blocks: Blocks, offset: int) -> None:
    """Raise `Damage` if anything but white space follows the array."""
    for block in blocks:
        if block.strip():
            raise Damage(offset, "text follows the end of the array", b"\n" + block, offset - 1)
        offset += len(block)


def lines(blocks: Blocks, offset: int, strict: bool) -> Iterator[Item]:
    """The lines of JSON Lines that are not blank; the last must be complete, with `strict` all."""
    held: list[bytes] = []
    for block in blocks:
        begin = 0
        while (end := block.find(b"\n", begin)) >= 0:
            line = b"".join([*held, block[begin:end]])
            if strict and line.strip() and not parses(line):
                raise Damage(offset, "this is not JSON", line + block[end:], offset)
            if line.strip():
                yield Item(offset, line.strip())
            offset += len(line) + 1
            held, begin = [], end + 1
        held.append(block[begin:])
        if sum(map(len, held)) > LONGEST:
            reason = f"the line does not end within {LONGEST >> 20} MB"
            raise Damage(offset, reason, b"".join(held), offset)
    line = b"".join(held)
    if line.strip():
        if not parses(line):
            raise Damage(offset, "the file ends inside the line", line, offset)
        yield Item(offset, line.strip())


def resume(damage: Damage, blocks: Blocks, start: re.Pattern) -> int | None:
    """Where in the text `blocks` now begins: at the next `start` of a record after the damage."""
    text, offset = damage.rest[1:], damage.rest_offset + len(damage.rest[:1])
    while not (found := start.search(text)):
        if not (block := next(blocks, b"")):
            return None
        kept = text[-100:]  # the end of the block may cut a start in two
        offset, text = offset + len(text) - len(kept), kept + block
    blocks.put_back(text[found.start() :])
    return offset + found.start()
