"""Files that appear whole, and together, or not at all."""

import errno
import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from llama_lora.cli import InputError

BLOCK = 1 << 20  # bytes written at a time


class Outputs:
    """Files that replace those at their paths when the block ends well.

    All of them are on disk before the first is put in its place; a failure before that leaves every
    old file as it was. Until then the old files can be read, so a stage can overwrite its own
    input.
    """

    def __init__(self):
        self.files: list[tuple[BinaryIO, Output]] = []
        self.writers: list[Writer] = []
        self.scratch_files: list[Output] = []

    def __enter__(self) -> "Outputs":
        return self

    def open(self, path: str) -> BinaryIO:
        """A new file for `path`. Raises `InputError` if it cannot be written there."""
        if os.path.realpath(path) in (output.target for _, output in self.files):
            raise InputError(f"{path}: two outputs cannot be written to one file")
        output = Output(path)
        file = io.BufferedWriter(output, BLOCK)
        self.files.append((file, output))
        return file

    def corpus(self, path: str) -> "Writer":
        """A `Writer` of a new corpus file for `path`."""
        writer = Writer(self.open(path), path)
        self.writers.append(writer)
        return writer

    def scratch(self, path: str) -> BinaryIO:
        """A temporary file beside `path`, which is removed when the block ends."""
        output = Output(path, ".scratch")
        self.scratch_files.append(output)
        return io.BufferedWriter(output, BLOCK)

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                for writer in self.writers:
                    writer.finish()
                for file, output in self.files:
                    file.flush()
                    output.sync()
                for _, output in self.files:
                    output.put_in_place()
        finally:
            for output in [*self.scratch_files, *(output for _, output in self.files)]:
                output.close()


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write that replaces the one at `path` when the block ends well."""
    with Outputs() as outputs:
        yield outputs.open(path)


class Output(io.FileIO):
    """A file without a name until it is put in its place, so a killed run leaves nothing behind.

    If the file system has no nameless files, it lies beside its place as `NAME.part`; the next run
    reuses what a killed run left. What the system refuses becomes an `InputError`.
    """

    def __init__(self, path: str, ending: str = ".part"):
        self.path, self.target = path, os.path.realpath(path)
        self.folder, self.part = os.path.dirname(self.target), self.target + ending
        if os.path.exists(self.target) and not os.path.isfile(self.target):
            raise InputError(f"{path}: cannot be written: it is not a regular file")
        with self.refusals("cannot write there"):
            descriptor = nameless(self.folder)
            self.has_name = descriptor is None
            super().__init__(self.locked_part() if self.has_name else descriptor, "w")

    def write(self, data) -> int | None:
        with self.refusals("nothing was changed"):
            return super().write(data)

    def sync(self) -> None:
        """Return once everything written is on the disk."""
        with self.refusals("nothing was changed"):
            os.fsync(self.fileno())

    def put_in_place(self) -> None:
        """Replace the file at `path`, atomically and durably."""
        with self.refusals("cannot be put in its place"), locked(self.folder) as folder:
            if not self.has_name:
                with suppress(FileNotFoundError):  # of a run that was killed right here
                    os.unlink(self.part)
                # A link cannot replace a file, so there is a name for a moment. `src_dir_fd` makes
                # Python follow the link to the file itself.
                os.link(f"/proc/self/fd/{self.fileno()}", self.part, src_dir_fd=folder)
            os.replace(self.part, self.target)
            self.has_name = False
            with suppress(OSError):  # some file systems cannot make a rename durable
                os.fsync(folder)

    def close(self) -> None:
        if not self.closed and self.has_name:
            with suppress(FileNotFoundError):
                os.unlink(self.part)
        super().close()

    @contextmanager
    def refusals(self, consequence: str) -> Iterator[None]:
        """Turn what the system refuses into an `InputError` that names the file."""
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}; {consequence}") from None

    def locked_part(self) -> int:
        """A descriptor of `NAME.part`, emptied and locked against other runs."""
        while True:
            descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise InputError(f"{self.path}: another run is writing it") from None
            except OSError:
                pass  # a file system without locks
            # The run that held the lock may have renamed the file before letting go of it.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.part)):
                    os.ftruncate(descriptor, 0)
                    return descriptor
            os.close(descriptor)


def nameless(folder: str) -> int | None:
    """A descriptor of a new nameless file in `folder`; None if the file system has none."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
            return None
        raise


@contextmanager
def locked(folder: str) -> Iterator[int]:
    """A descriptor of `folder`, locked so that no other run puts a file in place there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


class Writer:
    """Writes lines of JSON: as an array with one item per line or, for `.jsonl` names, bare."""

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
        """Write the end of the file; nothing may follow."""
        self.file.write(self.closing if self.count else self.empty)
