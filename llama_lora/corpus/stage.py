"""Running a stage: a pure function from one conversation to conversations, over a whole file.

`run` streams the input, maps it in order over worker processes with a bounded number of
conversations in flight, shows progress, writes the output whole or not at all, and keeps accounts.
"""

import argparse
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from llama_lora.cli import InputError, Terminated
from llama_lora.corpus import files, formats
from llama_lora.corpus.account import Account, write_account
from llama_lora.corpus.atomic import Outputs
from llama_lora.corpus.conversation import (
    Conversation,
    Kept,
    Rejected,
    Turn,
    count_pairs,
)
from llama_lora.corpus.output import Arrange, Direct, Line, Spool
from llama_lora.corpus.pool import Died, Pool
from llama_lora.corpus.shelf import Marks
from llama_lora.model.hardware import cores

# Of a chunk: enough that handing it over costs little, and little enough to keep memory flat.
CHUNK_BYTES = 256 << 10

Process = Callable[[Conversation], Kept]
Mark = Callable[[list[Turn]], Marks]


@dataclass
class Result:
    """What a chunk of records became."""

    account: Account = field(default_factory=Account)
    lines: list[Line] = field(default_factory=list)
    rejected: list[bytes] = field(default_factory=list)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and the command as it can be pasted."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def parser(doc: str, several: bool = False) -> argparse.ArgumentParser:
    """A parser described by a script's docstring, with the flags that every stage takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help)
    add = parser.add_argument
    many = {"nargs": "+"} if several else {}
    add(
        "--in",
        "--in-file",
        dest="inputs",
        required=True,
        metavar="FILE",
        help="conversations to read: a JSON array or JSON Lines, gzipped or not",
        **many,
    )
    add(
        "--out",
        "--out-file",
        dest="out",
        required=True,
        metavar="FILE",
        help="file to write: a JSON array with one conversation a line, or JSON Lines for .jsonl",
    )
    add("--rejected", metavar="FILE", help="also write what was rejected, with the reason, here")
    add("--workers", type=positive, default=cores(), help="processes")
    add("--salvage", action="store_true", help="keep what is complete in a damaged file")
    add("--begin", type=natural, default=0, metavar="N", help="skip the first N conversations")
    add("--end", type=natural, metavar="N", help="stop before conversation N, counted from 0")
    return parser


def natural(text: str, least: int = 0) -> int:
    """A whole number from `least` on, for argparse."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is not at least {least}")
    return number


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    return natural(text, least=1)


def fraction(text: str) -> float:
    """A number between 0 and 1, for argparse."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def run(
    args: argparse.Namespace,
    build: Callable[[], Process],
    arrange: Arrange | None = None,
) -> Account:
    """Map the function that `build` makes over the conversations of `args.inputs` to `args.out`.

    `build` is called once in each worker process, so it and what it holds must be picklable. The
    function returns `Kept` or raises `Rejected`. With `arrange`, the conversations are kept on
    disk until all were read; it then decides from their marks where each goes.
    """
    began = time.monotonic()
    inputs = args.inputs if isinstance(args.inputs, list) else [args.inputs]
    stop_on_sigterm()
    account, damages = Account(), []
    with ExitStack() as stack:
        outputs = stack.enter_context(Outputs())
        out = outputs.corpus(args.out)
        rejects = outputs.corpus(args.rejected) if args.rejected else None
        sink = Spool(outputs.scratch(args.out)) if arrange else Direct(out, account)
        records = tracked(inputs, args, damages, stack)
        work = Work(build, arrange and arrange.marker)
        with closing(mapped(chunked(records, CHUNK_BYTES), work, args.workers)) as results:
            for result in results:
                account.add(result.account)
                for line in result.lines:
                    sink.put(line)
                if rejects:
                    for line in result.rejected:
                        rejects.write(line)
        if arrange:
            sink.arrange(arrange, args.out, out, rejects, account, outputs)
        seconds = time.monotonic() - began
        write_account(outputs, args, inputs, account, damages, seconds)
    for damage in damages:
        print(f"salvaged: {damage}", file=sys.stderr)
    return account


def stop_on_sigterm() -> None:
    """End on SIGTERM as on Ctrl-C: with the files put back in order."""

    def stop(number, frame):
        raise Terminated

    signal.signal(signal.SIGTERM, stop)


def tracked(inputs, args, damages, stack) -> Iterator[tuple[str, files.Record]]:
    """The records of all inputs that are asked for, under a progress bar by bytes."""
    from tqdm import tqdm

    size = sum(os.path.getsize(path) for path in inputs if os.path.isfile(path))
    bar = stack.enter_context(
        # Without a terminal there is no bar: a log would only fill up with it.
        tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False, file=sys.stderr)
    )
    records = (
        (path, record)
        for path in inputs
        for record in files.read(path, args.salvage, damages.append, bar.update)
    )
    return islice(records, args.begin, args.end)


def chunked(records: Iterable[tuple[str, files.Record]], most: int) -> Iterator[list]:
    """The records in lists of about `most` bytes."""
    chunk, size = [], 0
    for record in records:
        chunk.append(record)
        size += len(record[1].raw)
        if size >= most:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def mapped(chunks, build: "Work", workers: int) -> Iterator[Result]:
    """The results of all chunks, in order; the processes are gone when they are all there."""
    if workers == 1:
        work = build()
        yield from (work(chunk, lambda number: None) for chunk in chunks)
        return
    with Pool(build, workers) as pool:
        yield from named_deaths(pool.map(chunks))


def named_deaths(results: Iterator[Result]) -> Iterator[Result]:
    """`results`; the death of a worker names the conversation that it was at."""
    try:
        yield from results
    except Died as death:
        path, record = death.item
        raise InputError(
            f"{path}: conversation {record.index} (byte {record.offset}): the process working on "
            f"it died ({death}); nothing was written"
        ) from None


@dataclass
class Work:
    """Makes the function that a worker applies to chunks."""

    build: Callable[[], Process]
    marker: Callable[[], Mark] | None

    def __call__(self) -> Callable[[list, Callable[[int], None]], Result]:
        return partial(work, self.build(), self.marker and self.marker())


def work(process: Process, mark: Mark | None, chunk: list, at: Callable[[int], None]) -> Result:
    """What `process` makes of a chunk of records; `at` is told which is under way."""
    result = Result()
    for number, (path, record) in enumerate(chunk):
        at(number)
        one = reading(record)
        book(result, one, one.rejected or outcome_of(process, one.conversation), mark, path, record)
    return result


def outcome_of(process: Process, conversation: Conversation) -> Kept | Rejected:
    """What `process` makes of a sound conversation."""
    try:
        return process(conversation)
    except Rejected as rejected:
        return rejected


@dataclass
class Reading:
    """A record as it was read: a conversation, or why it is none."""

    found: Any = None
    conversation: Conversation | None = None
    repairs: Counter = field(default_factory=Counter)
    format: str = ""
    rejected: Rejected | None = None


def reading(record: files.Record) -> Reading:
    """Parse and check one record."""
    one = Reading()
    try:
        one.found, lenient = parsed(record.raw)
        one.conversation, one.repairs, one.format = formats.read(one.found)
        one.repairs["lenient JSON"] += lenient
    except Rejected as rejected:
        one.rejected = rejected
    return one


def book(result: Result, one: Reading, outcome: Kept | Rejected, mark, path, record) -> None:
    """Put down on `result` what became of a record."""
    account = result.account
    account.read += 1
    account.formats[one.format] += one.format != ""
    pairs = count_pairs(one.conversation["conversations"]) if one.conversation else 0
    try:
        if isinstance(outcome, Rejected):
            raise outcome
        lines = [as_line(made, mark) for made in outcome.conversations]
    except Rejected as rejected:
        account.reject(pairs, rejected.reason)
        about = {"reason": rejected.reason, "detail": rejected.detail, "file": path}
        about |= {"index": record.index, "byte": record.offset}
        result.rejected.append(rejected_line(about, record.raw, one.found))
        return
    account.repairs.update(one.repairs)
    account.keep(pairs, outcome)
    result.lines.extend(lines)


def parsed(raw: bytes) -> tuple[Any, bool]:
    """`files.parse` whose failure is a rejection."""
    try:
        return files.parse(raw)
    except ValueError as error:
        raise Rejected("not JSON", str(error)) from None


def as_line(conversation: Conversation, mark: Mark | None) -> Line:
    """`conversation` as JSON, with the id apart since it may have to be made distinct."""
    turns = conversation["conversations"]
    body = {key: value for key, value in conversation.items() if key != "id"}
    try:
        text = files.dump(body)
    except ValueError as error:
        raise Rejected("not JSON", str(error)) from None
    return Line(conversation["id"], b"," + text[1:], count_pairs(turns), mark and mark(turns))


def rejected_line(about: dict, raw: bytes, found: Any) -> bytes:
    """A line of the `--rejected` file: what was read, as JSON where it is any."""
    try:
        return files.dump({**about, "conversation": found})
    except ValueError:
        return files.dump({**about, "text": raw.decode(errors="replace")})
