"""Results that take long to compute, each kept as soon as it is there."""

import fcntl
import os
import sys
from collections import UserDict
from typing import Any

from llama_lora.cli import InputError
from llama_lora.corpus.records.json_values import dump, parse


class PartialResults(UserDict):
    """Results by key, both of JSON's types, which lie in `PATH.partial` until `PATH` is complete.

    A run that ends early loses none: the first line says what they depend on, and the next run with
    the same settings continues after the last.
    """

    def __init__(self, path: str, settings: dict[str, Any], results: str):
        """Take over what an earlier run has kept.

        Args:
            settings: what the results depend on.
            results: their name in messages.

        Raises:
            InputError: `path` cannot be written; what lies there depends on something else; or
                another run is writing it.
        """
        super().__init__()
        self.path, self.results = f"{path}.partial", results
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path}: cannot be written: it is not a regular file")
        try:
            self._file = open(self.path, "a+b")  # noqa: SIM115  (closed in __exit__)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; cannot write there") from None
        try:
            self._lock(path)
            self._go_on(parse(dump(settings))[0])
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "PartialResults":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._file.close()
        if kind and self:
            print(
                f"{self.path}: {len(self):,} {self.results} are kept; the same command continues "
                "from there",
                file=sys.stderr,
            )
        elif kind:
            self.remove()

    def __setitem__(self, key, value) -> None:
        self._write({"key": key, "value": value})
        self.data[key] = value

    def remove(self) -> None:
        """Remove the file, once the output made from the results is in its place."""
        os.unlink(self.path)

    def _write(self, record: dict) -> None:
        try:
            self._file.write(dump(record) + b"\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}") from None

    def _lock(self, path: str) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another run is writing it") from None
        except OSError:
            pass  # a file system without locks

    def _go_on(self, settings: dict) -> None:
        """Take over the results in the file, up to a line that was cut off."""
        self._file.seek(0)
        whole, found = 0, {}
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                record = parse(line)[0]
                if whole == 0:
                    found = dict(record)
                else:
                    self.data[record["key"]] = record["value"]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise self._not_ours() from None
            whole += len(line)
        if self.data:
            self._check(found, settings)
            self._file.truncate(whole)
        elif whole and found.keys() != settings.keys():
            raise self._not_ours()
        else:  # nothing is lost, whatever the settings were
            self._file.truncate(0)
            self._write(settings)

    def _not_ours(self) -> InputError:
        return InputError(
            f"{self.path}: expected the {self.results} of an earlier run, found something else; "
            "move it away"
        )

    def _check(self, found: dict, settings: dict) -> None:
        if differing := [key for key in settings if found.get(key) != settings[key]]:
            raise InputError(
                f"{self.path}: holds {self.results} of a run that differs in "
                f"{', '.join(differing)}; remove it to start over"
            )
