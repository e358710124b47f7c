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
from itertools import chain, islice
from typing import Any

from llama_lora.cli import InputError, Terminated
from llama_lora.corpus.engine.account import Account, write_account
from llama_lora.corpus.engine.fingerprints import Fingerprint
from llama_lora.corpus.engine.output import Arranger, DirectOutput, Line, SpooledOutput
from llama_lora.corpus.engine.worker_pool import Pool, WorkerDied
from llama_lora.corpus.records import formats, reader
from llama_lora.corpus.records.atomic_files import Outputs
from llama_lora.corpus.records.conversation import Conversation, Kept, Rejected, Turn, count_pairs
from llama_lora.corpus.records.json_values import dump, parse
from llama_lora.hardware.device import cores
from llama_lora.options import Help, between

# Bytes of a chunk: enough that handing it over costs little, and few enough to keep memory flat.
CHUNK_BYTES = 256 << 10
WORTH_PROCESSES = 4  # chunks; for a smaller file, starting processes costs more than it saves

Process = Callable[[Conversation], Kept]
Fingerprinter = Callable[[list[Turn]], Fingerprint]


@dataclass
class Result:
    """What a chunk of records became."""

    account: Account = field(default_factory=Account)
    lines: list[Line] = field(default_factory=list)
    rejected: list[bytes] = field(default_factory=list)

    def keep(self, one: "Reading", kept: Kept, lines: list[Line]) -> None:
        self.account.repairs.update(one.repairs)
        self.account.keep(one.pairs, kept)
        self.lines.extend(lines)

    def reject(self, one: "Reading", why: Rejected, path: str, record: reader.Record) -> None:
        self.account.reject(one.pairs, why.reason)
        about = {"reason": why.reason, "detail": why.detail, "file": path}
        about |= {"index": record.index, "byte": record.offset}
        self.rejected.append(rejected_line(about, record.raw, one.found))


def parser(doc: str, several: bool = False, writes: bool = True) -> argparse.ArgumentParser:
    """A parser with a script's docstring as its description, and the flags that every stage takes.

    With `writes`, it also takes the flags for the output.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help)
    add = parser.add_argument
    many = {"nargs": "+"} if several else {}
    add(
        "--in",
        "--in-file",
        dest="inputs",
        required=True,
        metavar="FILE",
        help="file of conversations: a JSON array or JSON Lines, gzipped or not",
        **many,
    )
    if writes:
        add(
            "--out",
            "--out-file",
            dest="out",
            required=True,
            metavar="FILE",
            help="file to write: a JSON array with one conversation per line, or JSON Lines if the "
            "name ends in .jsonl",
        )
        add("--rejected", metavar="FILE", help="file for the rejected conversations, with reasons")
    add("--workers", type=between(1, kind=int), default=cores(), help="number of worker processes")
    add("--salvage", action="store_true", help="keep the complete conversations of a damaged file")
    add(
        "--begin",
        type=between(0, kind=int),
        default=0,
        metavar="N",
        help="skip the first N conversations",
    )
    add(
        "--end",
        type=between(0, kind=int),
        metavar="N",
        help="stop before conversation N, counted from 0",
    )
    return parser


def run(
    args: argparse.Namespace,
    build: Callable[[], Process],
    arrange: Arranger | None = None,
) -> Account:
    """Map the function that `build` makes over the conversations of `args.inputs` to `args.out`.

    `build` is called once in each worker process, so it and what it holds must be picklable. The
    function returns `Kept` or raises `Rejected`. With `arrange`, the conversations are kept on disk
    until all have been read; then it decides from their fingerprints where each goes.
    """
    began = time.monotonic()
    inputs = args.inputs if isinstance(args.inputs, list) else [args.inputs]
    stop_on_sigterm()
    if args.rejected:
        spare(inputs, "--rejected", args.rejected)
    account, damages = Account(), []
    with ExitStack() as stack:
        outputs = stack.enter_context(Outputs())
        out = outputs.corpus(args.out)
        rejects = outputs.corpus(args.rejected) if args.rejected else None
        sink = SpooledOutput(outputs.scratch(args.out)) if arrange else DirectOutput(out, account)
        records = tracked(inputs, args, damages, stack)
        make = Work(build, arrange and arrange.fingerprinter)
        with closing(mapped(chunked(records, CHUNK_BYTES), make, args.workers)) as results:
            for result in results:
                account.add(result.account)
                for line in result.lines:
                    sink.put(line)
                if rejects:
                    for line in result.rejected:
                        rejects.write(line)
        written = [args.out]
        if arrange:
            written = sink.arrange(arrange, args.out, out, rejects, account, outputs)
        seconds = time.monotonic() - began
        for path in written:
            write_account(outputs, path, args, inputs, account, damages, seconds)
    tell(damages)
    return account


def spare(inputs: list[str], flag: str, path: str) -> None:
    """Raise `InputError` where the output that `flag` names would replace an input."""
    if os.path.realpath(path) in map(os.path.realpath, inputs):
        raise InputError(f"{path}: {flag} would replace this input")


def tell(damages: list[str]) -> None:
    """Say what was cut from damaged files."""
    for damage in damages:
        print(f"salvaged: {damage}", file=sys.stderr)


def stop_on_sigterm() -> None:
    """End on SIGTERM as on Ctrl-C: with the files cleaned up."""

    def stop(number, frame):
        raise Terminated

    signal.signal(signal.SIGTERM, stop)


def tracked(inputs, args, damages, stack) -> Iterator[tuple[str, reader.Record]]:
    """The records of all inputs from `--begin` to `--end`, with a progress bar in bytes."""
    from tqdm import tqdm

    size = sum(os.path.getsize(path) for path in inputs if os.path.isfile(path))
    bar = stack.enter_context(
        # Without a terminal there is no bar: it would only fill up a log.
        tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False, file=sys.stderr)
    )
    records = (
        (path, record)
        for path in inputs
        for record in reader.read(path, args.salvage, damages.append, bar.update)
    )
    return islice(records, args.begin, args.end)


def chunked(records: Iterable[tuple[str, reader.Record]], most: int) -> Iterator[list]:
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


def mapped(chunks: Iterator[list], build: Callable, workers: int) -> Iterator:
    """For each chunk, in order, the result of the function that `build` makes.

    The worker processes have ended once the iterator is exhausted.
    """
    first = list(islice(chunks, WORTH_PROCESSES))
    chunks = chain(first, chunks)
    if workers == 1 or len(first) < WORTH_PROCESSES:
        function = build()
        yield from (function(chunk, lambda number: None) for chunk in chunks)
        return
    with Pool(build, workers) as pool:
        yield from named_deaths(pool.map(chunks))


def named_deaths(results: Iterator) -> Iterator:
    """`results`; if a worker dies, the error names the conversation it was working on."""
    try:
        yield from results
    except WorkerDied as death:
        path, record = death.item
        raise InputError(
            f"{path}: conversation {record.index} (byte {record.offset}): the process working on "
            f"it died ({death}); nothing was written"
        ) from None


@dataclass
class Work:
    """Makes the function that a worker applies to chunks."""

    build: Callable[[], Process]
    fingerprinter: Callable[[], Fingerprinter] | None

    def __call__(self) -> Callable[[list, Callable[[int], None]], Result]:
        return partial(work, self.build(), self.fingerprinter and self.fingerprinter())


def work(
    process: Process,
    fingerprint_of: Fingerprinter | None,
    chunk: list,
    at: Callable[[int], None],
) -> Result:
    """What `process` makes of a chunk of records; `at` gets the number of each as it is begun."""
    result = Result()
    for number, (path, record) in enumerate(chunk):
        at(number)
        one = reading(record)
        result.account.formats[one.format] += one.format != ""
        try:
            kept = processed(process, one)
            lines = [as_line(made, fingerprint_of) for made in kept.conversations]
        except Rejected as rejected:
            result.reject(one, rejected, path, record)
        else:
            result.keep(one, kept, lines)
    return result


@dataclass
class Reading:
    """A record as it was read: a conversation, or why it is not one."""

    found: Any = None
    conversation: Conversation | None = None
    repairs: Counter = field(default_factory=Counter)
    format: str = ""
    rejected: Rejected | None = None

    @property
    def pairs(self) -> int:
        return count_pairs(self.conversation["conversations"]) if self.conversation else 0


def reading(record: reader.Record) -> Reading:
    """Parse and check one record."""
    one = Reading()
    try:
        one.found, lenient = parsed(record.raw)
        one.conversation, one.repairs, one.format = formats.read(one.found)
        one.repairs["lenient JSON"] += lenient or record.lenient
    except Rejected as rejected:
        one.rejected = rejected
    return one


def processed(process: Process, one: Reading) -> Kept:
    """What `process` makes of what was read. Raises `Rejected`, also if the record was unsound."""
    if one.rejected:
        raise one.rejected
    return process(one.conversation)


def parsed(raw: bytes) -> tuple[Any, bool]:
    """As `parse`, but a failure is a rejection."""
    try:
        return parse(raw)
    except ValueError as error:
        raise Rejected("not JSON", str(error)) from None


def as_line(conversation: Conversation, fingerprint_of: Fingerprinter | None) -> Line:
    """`conversation` as JSON, with the id kept apart, since it may have to be made distinct."""
    turns = conversation["conversations"]
    body = {key: value for key, value in conversation.items() if key != "id"}
    try:
        text = dump(body)
    except ValueError as error:
        raise Rejected("not JSON", str(error)) from None
    fingerprint = fingerprint_of and fingerprint_of(turns)
    return Line(conversation["id"], b"," + text[1:], count_pairs(turns), fingerprint)


def rejected_line(about: dict, raw: bytes, found: Any) -> bytes:
    """A line of the `--rejected` file: what was read, as JSON if it is valid JSON."""
    try:
        return dump({**about, "conversation": found})
    except ValueError:
        return dump({**about, "text": raw.decode(errors="replace")})
