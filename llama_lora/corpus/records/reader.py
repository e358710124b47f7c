"""Corpus files: their records stream in with flat memory.

A file is a JSON array or JSON Lines, gzipped or not, with or without a byte-order mark; its content
tells which.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO, NamedTuple

from llama_lora.cli import InputError
from llama_lora.corpus.records import scanner
from llama_lora.corpus.records.json_values import parse
from llama_lora.corpus.records.scanner import BLANK, Blocks, Damage, Item

BLOCK = 1 << 20  # bytes read at a time
PACKED = BLOCK >> 4  # and of gzipped ones

UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = b"\xff\xfe", b"\xfe\xff"
GZIP_MARK, GZIP = b"\x1f\x8b", 31  # 31 means gzip to zlib
RECORD_KEYS = "conversations", "items", "messages", "instruction"  # a record holds one of these
PROMPT_KEYS = "turns", "prompt", "question", "text"  # or one of these, in a file of prompts
FIRST_KEY = re.compile(rb'\{\s*"([^"]{1,40})"\s*:')


class Record(NamedTuple):
    """The `index`-th record of a file, from 0; it begins `offset` bytes into the text.

    It is `lenient` if the commas before it are not valid JSON.
    """

    index: int
    offset: int
    raw: bytes
    lenient: bool = False


class Cut(NamedTuple):
    """How a text is cut into records, and what a record starts with."""

    records: Callable[[Blocks, int, bool], Iterator[Item]]
    start: re.Pattern


def read(
    path: str,
    salvage: bool = False,
    report: Callable[[str], None] = lambda line: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[Record]:
    """The records of the file at `path`, in order.

    `advance` gets the number of bytes read from disk. A file that is no corpus file raises
    `InputError`. So does a damaged one; but with `salvage` it gives every complete record before
    and after the damage, and `report` gets what was cut and where.
    """
    try:
        with open(path, "rb") as file:
            blocks = Blocks(blocks_of(file, advance))
            cut, offset = recognised(path, blocks)
            index, damage = 0, None
            while True:
                try:
                    if damage and (offset := scanner.resume(damage, blocks, cut.start)) is None:
                        break
                    for item in cut.records(blocks, offset, salvage):
                        yield Record(index, *item)
                        index += 1
                    break
                except Damage as error:
                    damage = error
                    where = f"{path}: conversation {index} (byte {damage.offset}): {damage.reason}"
                    if not salvage:
                        keeps = f". --salvage keeps the {index} complete ones." if index else ""
                        raise InputError(where + keeps) from None
                    report(where)
            if salvage and not index:
                raise InputError(f"{path}: no complete conversation is left in it")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def blocks_of(file: BinaryIO, advance: Callable[[int], None]) -> Iterator[bytes]:
    """The text of `file` in blocks, unpacked if it is gzipped.

    No block ends between a backslash and what it escapes, so each can be searched for quotes.
    """
    if file.peek(2)[:2] == GZIP_MARK:
        blocks = unpacked(pieces(file, PACKED, advance))
    else:
        blocks = pieces(file, BLOCK, advance)
    held = b""
    for block in blocks:
        block = held + block
        held = b"\\" if (len(block) - len(block.rstrip(b"\\"))) % 2 else b""
        if block := block.removesuffix(held):
            yield block
    if held:
        yield held


def pieces(file: BinaryIO, size: int, advance: Callable[[int], None]) -> Iterator[bytes]:
    """The bytes of `file`, `size` at a time."""
    while piece := file.read(size):
        advance(len(piece))
        yield piece


def unpacked(packed: Iterator[bytes]) -> Iterator[bytes]:
    """The text in gzipped bytes, up to the byte where they are damaged."""
    inflater, offset = zlib.decompressobj(GZIP), 0
    for piece in packed:
        while piece:
            if inflater.eof and not (piece := piece.lstrip(b"\0")):  # padding
                break
            if inflater.eof:  # a file may consist of several gzipped ones
                inflater = zlib.decompressobj(GZIP)
            before = inflater.copy()
            try:
                text = inflater.decompress(piece)
            except zlib.error:
                text = b"".join(sound_part(before, piece))
                yield text
                raise Damage(offset + len(text), "the gzipped data is damaged here") from None
            offset += len(text)
            piece = inflater.unused_data
            yield text
    if not inflater.eof:
        raise Damage(offset, "the gzipped data ends here before it is complete")


def sound_part(inflater, piece: bytes) -> Iterator[bytes]:
    """What `inflater` makes of `piece` up to the byte at which it fails."""
    with suppress(zlib.error):
        for byte in piece:
            yield inflater.decompress(bytes([byte]))


def recognised(path: str, blocks: Blocks) -> tuple[Cut, int]:
    """How to cut the text, and where in it `blocks` now begins."""
    try:
        text, offset = beginning(blocks)
        if text.startswith(UTF16_MARKS):
            raise InputError(f"{path}: the text is UTF-16, expected UTF-8")
        if not text:
            raise InputError(f"{path}: the file is empty, expected a JSON array or JSON Lines")
        if text.startswith(b"["):
            blocks.put_back(text[1:])
            return Cut(scanner.array_items, record_start(text[1:].lstrip(BLANK))), offset + 1
        while text.startswith(b"{") and b"\n" not in text.rstrip() and len(text) < scanner.LONGEST:
            if not (block := next(blocks, b"")):
                break
            text += block
    except Damage as damage:
        raise InputError(f"{path}: {damage.reason}") from None
    if text.startswith(b"{"):
        first, _, rest = text.partition(b"\n")
        rest = rest.lstrip()
        if rest.startswith(b"{") or (not rest and may_be_record(first)):
            blocks.put_back(text)
            return Cut(scanner.lines, record_start(text, rb"|(?<=\n)[ \t\r]*\{")), offset
    key = FIRST_KEY.match(text)
    what = "an object" if key else "text"
    start = (key[1] if key else text[:20]).decode(errors="replace")
    start = json.dumps(start) if key else repr(start)
    raise InputError(
        f"{path}: expected an array of conversations or one conversation a line, "
        f"found {what} that starts with {start}"
    )


def record_start(first: bytes, other: bytes = b"") -> re.Pattern:
    """A pattern of how records start in a file whose first one is `first`, or else `other`.

    That is a brace and a key. No string holds them, since quotes are escaped in strings.
    """
    key = FIRST_KEY.match(first)
    keys = {b"id", *map(str.encode, RECORD_KEYS), *([key[1]] if key else [])}
    return re.compile(rb'\{\s*"(?:%s)"\s*:' % b"|".join(map(re.escape, sorted(keys))) + other)


def may_be_record(line: bytes) -> bool:
    """Whether the only line of a file is a record, or was one before it was damaged."""
    try:
        return any(key in RECORD_KEYS + PROMPT_KEYS for key in parse(line)[0])
    except ValueError:
        return True


def beginning(blocks: Blocks) -> tuple[bytes, int]:
    """The text from its first visible character on, and how many bytes come before it."""
    offset = 0
    for block in blocks:
        text = block.removeprefix(UTF8_MARK) if offset == 0 else block
        text = text.lstrip(BLANK)
        offset += len(block) - len(text)
        if text:
            return text, offset
    return b"", offset
