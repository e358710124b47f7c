"""A small pool of worker processes that keeps order, bounds memory, and knows what killed whom."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any

from llama_lora.cli import InputError

AHEAD = 4  # chunks in flight for each worker, so that results do not pile up behind one slow chunk

BETWEEN = -1  # the item of a worker that is between items

# What a worker can send: that it waits for work, the result of a chunk, or why it gave up.
READY, DONE, BAD_INPUT, FAULT = "ready", "done", "bad input", "fault"


class WorkerDied(Exception):
    """A worker died while it was at `item`."""

    def __init__(self, item: Any, exit_code: int | None):
        super().__init__(ending(exit_code))
        self.item = item


def ending(exit_code: int | None) -> str:
    """How a process ended."""
    killed = exit_code is not None and exit_code < 0
    return f"signal {signal.Signals(-exit_code).name}" if killed else f"exit code {exit_code}"


class Pool:
    """Applies the function that `build()` makes to chunks: `function(chunk, at) -> result`.

    `at(i)` notes that item `i` of the chunk is begun. The processes are spawned: they share only
    what pickling `build` gives them. Unlike `concurrent.futures`, the pool knows which item killed
    a worker, and no worker outlives it, even if it is killed itself.
    """

    def __init__(self, build: Callable[[], Callable], workers: int):
        context = multiprocessing.get_context("spawn")
        # Ctrl-C reaches every process, but only the parent should answer it. It is blocked here, so
        # that a worker starts with it blocked; the tracker would unblock it as it starts.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        seen = []  # by another thread; a half-started worker would print a traceback
        handler = signal.signal(signal.SIGINT, lambda *at: seen.append(at))
        try:
            self.workers = [Worker(context, build) for _ in range(workers)]
        finally:
            signal.signal(signal.SIGINT, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if seen:
            signal.raise_signal(signal.SIGINT)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.connection.close()

    def map(self, chunks: Iterator[list]) -> Iterator[Any]:
        """The results for `chunks`, in order. Raises `WorkerDied`, or what a worker raised."""
        waited_for = {worker.connection: worker for worker in self.workers}
        idle: deque[Worker] = deque()
        done: dict[int, Any] = {}
        sent = given = 0
        more = True
        while True:
            # Only a worker that waits for a chunk is sent one, so sending cannot block on a full
            # pipe.
            while idle and more and sent - given < AHEAD * len(self.workers):
                chunk = next(chunks, None)
                if more := chunk is not None:
                    worker = idle.popleft()
                    worker.send(sent, chunk)
                    waited_for[worker.connection] = worker
                    sent += 1
            if not more and given == sent:
                return
            for connection in wait(list(waited_for)):
                worker = waited_for.pop(connection)
                done.update(worker.receive())
                idle.append(worker)
            while given in done:
                yield done.pop(given)
                given += 1


class Worker:
    """One process, the connection to it, and the item it is working on."""

    def __init__(self, context, build: Callable[[], Callable]):
        self.connection, theirs = context.Pipe()
        self.at = context.RawValue("q", BETWEEN)
        self.number, self.chunk = 0, []
        self.process = context.Process(target=serve, args=(theirs, build, self.at), daemon=True)
        self.process.start()
        theirs.close()  # so that its death ends the connection

    def send(self, number: int, chunk: list) -> None:
        self.number, self.chunk = number, chunk
        try:
            self.connection.send(chunk)
        except (BrokenPipeError, ConnectionResetError):
            self.bury()

    def receive(self) -> dict[int, Any]:
        """A result by the number of its chunk; empty when the worker has only started."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.bury()
        if kind == BAD_INPUT:
            raise InputError(value)
        if kind == FAULT:
            where = "" if self.at.value == BETWEEN else f"at {self.item[:1]!r}\n"
            raise RuntimeError(where + value)
        return {self.number: value} if kind == DONE else {}

    @property
    def item(self) -> Any:
        return self.chunk[self.at.value]

    def bury(self) -> None:
        self.process.join()
        code = self.process.exitcode
        if self.at.value != BETWEEN:
            raise WorkerDied(self.item, code)
        when = "between conversations" if self.chunk else "as it started"
        raise InputError(f"a process died {when} ({ending(code)}); nothing was written")


def serve(connection, build: Callable[[], Callable], at) -> None:
    """What a worker does until it is killed."""
    threading.Thread(target=end_with_parent, daemon=True).start()

    def note(number: int) -> None:
        at.value = number

    try:
        function = build()
        connection.send((READY, None))
        while True:
            result = function(connection.recv(), note)
            note(BETWEEN)
            connection.send((DONE, result))
    except InputError as error:
        connection.send((BAD_INPUT, str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has ended
    except Exception:
        connection.send((FAULT, traceback.format_exc()))


def end_with_parent() -> None:
    """End this process when the one that started it does, however it does."""
    multiprocessing.parent_process().join()
    os._exit(1)
