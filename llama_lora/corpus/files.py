"""Corpus files: records stream in with flat memory, and a file appears whole or not at all.

A file is a JSON array or JSON Lines, gzipped or not, with or without a byte-order mark; which of
them is told by its content. It is cut into records by its brackets without being parsed, so that
one bad record stays one bad record and the parsing can happen in other processes.
"""

import errno
import fcntl
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

import orjson

from llama_lora.cli import InputError

BLOCK = 1 << 20  # bytes read at a time
LONGEST = 64 << 20  # bytes of one record; what is longer was never closed

UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = b"\xff\xfe", b"\xfe\xff"
BLANK = b" \t\r\n"
# The start of a conversation. No JSON string can hold it, since quotes are escaped there.
RECORD_START = re.compile(rb'\{\s*"(?:id|conversations|items|messages|instruction)"\s*:')
FIRST_KEY = re.compile(rb'\{\s*"([^"]{1,40})"\s*:')


class Record(NamedTuple):
    """The `index`-th record of a file, from 0, which begins `offset` bytes into its text."""

    index: int
    offset: int
    raw: bytes


class Damage(Exception):
    """The text does not hold together from byte `offset` on.

    `rest` is what was read of the text from the damaged record on, and `rest_offset` its place.
    """

    def __init__(self, offset: int, reason: str, rest: bytes = b"", rest_offset: int = 0):
        super().__init__(reason)
        self.offset, self.reason, self.rest, self.rest_offset = offset, reason, rest, rest_offset


# ---------------------------------------------------------------------------------------- reading


def read(
    path: str,
    salvage: bool = False,
    report: Callable[[str], None] = lambda line: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[Record]:
    """The records of the file at `path`, in order.

    `advance` is told how many bytes were taken from disk. What is no corpus file at all raises
    `InputError`. A damaged one does too or, with `salvage`, gives every complete record before
    and after the damage, and `report` is told what was cut and where.
    """
    try:
        with open(path, "rb") as file:
            cut, blocks, offset = recognised(path, blocks_of(file, advance))
            index = 0
            while True:
                try:
                    for start, raw in cut(blocks, offset):
                        if salvage and not parses(raw):
                            raise Damage(start, "this is not JSON", raw, start)
                        yield Record(index, start, raw)
                        index += 1
                    break
                except Damage as damage:
                    where = f"{path}: conversation {index} (byte {damage.offset}): {damage.reason}"
                    if not salvage:
                        keeps = f". --salvage keeps the {index} complete ones." if index else ""
                        raise InputError(where + keeps) from None
                    report(where)
                    blocks, offset = resumed(damage, blocks)
            if salvage and not index:
                raise InputError(f"{path}: not one complete conversation is left in it")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def blocks_of(file: BinaryIO, advance: Callable[[int], None]) -> Iterator[bytes]:
    """The text of `file` in blocks, unpacked where it is gzipped.

    No block ends between a backslash and what it escapes, so each can be searched for quotes.
    """
    text = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
    taken = offset = 0
    while True:
        try:
            block = text.read(BLOCK)
            if (len(block) - len(block.rstrip(b"\\"))) % 2:
                block += text.read(1)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise Damage(offset, "the gzipped data is damaged or ends here") from None
        offset += len(block)
        position = offset if text is file else file.tell() if file.seekable() else taken
        advance(position - taken)
        taken = position
        if not block:
            return
        yield block


def recognised(path: str, blocks: Iterator[bytes]) -> tuple[Callable, Iterator[bytes], int]:
    """How to cut the text (`array_items` or `lines`), the text, and where in the file it starts."""
    try:
        start = next(blocks, b"")
        while not start.removeprefix(UTF8_MARK).strip() and (block := next(blocks, b"")):
            start = block
        if start.startswith(UTF16_MARKS):
            raise InputError(f"{path}: the text is UTF-16, expected UTF-8")
        text = start.removeprefix(UTF8_MARK).lstrip(BLANK)
        offset = len(start) - len(text)
        if not text:
            raise InputError(f"{path}: the file is empty, expected a JSON array or JSON Lines")
        if text.startswith(b"["):
            return array_items, chain([text[1:]], blocks), offset + 1
        while text.startswith(b"{") and b"\n" not in text.rstrip() and len(text) < LONGEST:
            if not (block := next(blocks, b"")):
                break
            text += block
    except Damage as damage:
        raise InputError(f"{path}: {damage.reason}") from None
    if text.startswith(b"{"):
        first, _, rest = text.partition(b"\n")
        rest = rest.lstrip()
        several = rest.startswith(b"{")
        if several or (not rest and (RECORD_START.match(first) or not parses(first))):
            return lines, chain([text], blocks), offset
    key = FIRST_KEY.match(text)
    found = f'an object that starts with "{key[1].decode(errors="replace")}"' if key else "text"
    raise InputError(
        f"{path}: expected an array of conversations or one conversation a line, found "
        + (found if key else f"{found} that starts with {text[:20].decode(errors='replace')!r}")
    )


def array_items(blocks: Iterator[bytes], offset: int) -> Iterator[tuple[int, bytes]]:
    """The items of a JSON array whose text, after its opening bracket, is in `blocks`.

    A bracket counts where an even number of quotes stands before it, once escapes are blanked; all
    of it is done on whole blocks, so the text is never stepped through in Python. `depth` is the
    number of open brackets, the array's own included.
    """
    import numpy as np

    change = np.zeros(256, np.int8)  # in depth, by byte
    change[list(b"[{")], change[list(b"]}")] = 1, -1
    depth, inside, quote = 1, False, offset
    held: list[bytes] = []  # what earlier blocks hold of the text from byte `start` on
    held_size, start = 0, offset
    for block in blocks:
        text = np.frombuffer(block.replace(b"\\\\", b"..").replace(b'\\"', b".."), np.uint8)
        quotes = np.flatnonzero(text == ord('"'))
        brackets = np.flatnonzero(change[text])
        brackets = brackets[(np.searchsorted(quotes, brackets) + inside) % 2 == 0]
        changes = change[text[brackets]]
        depths = depth + np.cumsum(changes)
        opens, ends = (changes > 0) & (depths == 2), (changes < 0) & (depths <= 1)
        begin = 0
        for at in np.flatnonzero(opens | ends):
            here = int(brackets[at]) + int(ends[at])  # an end belongs to what it closes
            found = b"".join(held) + block[begin:here]
            if opens[at]:
                yield from scalars(found, start)
            elif depths[at] == 1:
                yield start, found
            else:
                yield from scalars(found[:-1], start)
                expect_end(chain([block[here:]], blocks), offset + here)
                return
            held, held_size, begin, start = [], 0, here, offset + here
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


def scalars(text: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """What stands between two objects of an array: commas, and items that are no objects."""
    text = text.strip(BLANK + b",")
    if not text:
        return
    try:
        items = orjson.loads(b"[" + text + b"]")
    except orjson.JSONDecodeError:
        found = text[:20].decode(errors="replace")
        raise Damage(offset, f"expected an object, found {found!r}", text, offset) from None
    for item in items:
        yield offset, orjson.dumps(item)


def expect_end(blocks: Iterator[bytes], offset: int) -> None:
    """Raise `Damage` if anything but white space follows the array."""
    for block in blocks:
        if block.strip():
            raise Damage(offset, "text follows the end of the array", block, offset)
        offset += len(block)


def lines(blocks: Iterator[bytes], offset: int) -> Iterator[tuple[int, bytes]]:
    """The lines of JSON Lines that are not blank; the last must be whole."""
    held: list[bytes] = []
    for block in blocks:
        *whole, rest = block.split(b"\n")
        for line in whole:
            line = b"".join([*held, line])
            held = []
            if line.strip():
                yield offset, line.strip()
            offset += len(line) + 1
        held.append(rest)
        if sum(map(len, held)) > LONGEST:
            raise Damage(offset, f"the line does not end within {LONGEST >> 20} MB")
    line = b"".join(held)
    if line.strip():
        if not parses(line):
            raise Damage(offset, "the file ends inside the line")
        yield offset, line.strip()


def resumed(damage: Damage, blocks: Iterator[bytes]) -> tuple[Iterator[bytes], int]:
    """The text from the next start of a conversation on, after the one that is damaged."""
    text, offset, search_from = damage.rest, damage.rest_offset, 1
    while True:
        if found := RECORD_START.search(text, search_from):
            rest = text[found.start() :]
            return chain([rest], blocks), offset + found.start()
        block = next(blocks, b"")
        if not block:
            return iter([b"]"]), offset + len(text)
        kept = text[-100:]  # a start may be cut by the end of the block
        offset, text, search_from = offset + len(text) - len(kept), kept + block, 0


def parses(raw: bytes) -> bool:
    """Whether `parse` can read `raw`."""
    try:
        parse(raw)
    except ValueError:
        return False
    return True


def parse(raw: bytes) -> tuple[Any, bool]:
    """The JSON value in `raw`, and whether it took leniency.

    Lenient is: NaN and infinite numbers are null, raw control characters may stand in strings, and
    halves of surrogate pairs come out as they are. Raises `ValueError` for what is no JSON.
    """
    try:
        return orjson.loads(raw), False
    except orjson.JSONDecodeError as error:
        strict = error
    try:
        text = raw.decode()
        value = json.loads(text, strict=False, parse_constant=lambda _: None, parse_float=finite)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError(str(strict)) from None
    return value, True


def finite(digits: str) -> float | None:
    """The number, or None where it is too large for one."""
    number = float(digits)
    return number if math.isfinite(number) else None


def dump(value: Any) -> bytes:
    """`value` as one line of JSON in UTF-8. Raises `ValueError` where it is nested too deeply."""
    try:
        return orjson.dumps(value)
    except TypeError:
        pass  # whole numbers over 64 bits, lone surrogates, deep nesting
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


# ---------------------------------------------------------------------------------------- writing


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write that takes the place of the one at `path` when the block ends well.

    Until then it stands beside it as `NAME.part`. A failure removes it and leaves the old file;
    what a killed run leaves behind is taken over by the next. The file may be read meanwhile, so
    a stage can write over its own input.
    """
    target = os.path.realpath(path)
    part = target + ".part"
    try:
        if os.path.exists(target) and not os.path.isfile(target):
            raise InputError(f"{path}: cannot write there, it is not a regular file")
        file = os.fdopen(locked(part, path), "wb", buffering=BLOCK)
    except OSError as error:
        raise InputError(f"{path}: cannot write there: {error.strerror}") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, target)
        sync_folder(os.path.dirname(target))
    except BaseException as error:
        with suppress(OSError):
            os.unlink(part)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(f"{path}: {error.strerror}; nothing was changed") from None
        raise


def locked(part: str, path: str) -> int:
    """A descriptor of the emptied file `part`, which no other run is writing."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(f"{path}: another run is writing it") from None
        except OSError:
            pass  # a file system without locks
        # The run that held the lock may have renamed the file before letting go of it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(part)):
                os.ftruncate(descriptor, 0)
                return descriptor
        os.close(descriptor)


def sync_folder(folder: str) -> None:
    """Make a rename in `folder` last; some file systems cannot."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Writer:
    """Writes lines of JSON as an array with one item a line or, for `.jsonl` names, bare."""

    def __init__(self, file: BinaryIO, path: str):
        self.file = file
        bare = path.endswith(".jsonl")
        self.opening, self.between, self.closing = (
            (b"", b"\n", b"\n") if bare else (b"[\n", b",\n", b"\n]\n")
        )
        self.empty = b"" if bare else b"[]\n"
        self.count = 0

    def write(self, line: bytes) -> None:
        self.file.write(self.between if self.count else self.opening)
        self.file.write(line)
        self.count += 1

    def finish(self) -> None:
        self.file.write(self.closing if self.count else self.empty)


@contextmanager
def writing(path: str) -> Iterator[Writer]:
    """A `Writer` for the corpus file at `path`; see `replacing`."""
    with replacing(path) as file:
        writer = Writer(file, path)
        yield writer
        writer.finish()
