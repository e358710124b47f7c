"""The account of a stage: what became of everything it read, in conversations and in pairs."""

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from llama_lora.corpus.records.atomic_files import Outputs
from llama_lora.corpus.records.conversation import Kept
from llama_lora.corpus.records.json_values import dump


@dataclass
class Account:
    """What became of everything a stage read, in conversations and in pairs."""

    read: int = 0
    kept: int = 0
    written: int = 0
    rejected: Counter = field(default_factory=Counter)
    pairs_read: int = 0
    pairs_kept: int = 0
    pairs_rejected: Counter = field(default_factory=Counter)
    repairs: Counter = field(default_factory=Counter)
    formats: Counter = field(default_factory=Counter)
    seen: Counter = field(default_factory=Counter)

    def add(self, other: "Account") -> None:
        accumulate(self, other)

    def keep(self, pairs_read: int, kept: Kept) -> None:
        self.read += 1
        self.kept += 1
        self.written += len(kept.conversations)
        self.pairs_read += pairs_read
        self.pairs_kept += kept.pairs
        self.pairs_rejected.update(kept.dropped)
        self.repairs.update(kept.repairs)
        self.seen.update(kept.seen)

    def reject(self, pairs_read: int, reason: str) -> None:
        self.read += 1
        self.rejected[reason] += 1
        self.pairs_read += pairs_read
        self.pairs_rejected[reason] += pairs_read

    def turn_away(self, pairs: int, reason: str) -> None:
        """Reject a conversation that was first counted as kept."""
        self.kept -= 1
        self.written -= 1
        self.pairs_kept -= pairs
        self.rejected[reason] += 1
        self.pairs_rejected[reason] += pairs

    def __str__(self) -> str:
        lines = []
        if +self.repairs:
            lines.append("repaired: " + listed(self.repairs))
        lines.append("pairs: " + balance(self.pairs_read, self.pairs_kept, self.pairs_rejected))
        pieces = f" in {self.written:,} pieces" if self.written != self.kept else ""
        lines.append(balance(self.read, self.kept, self.rejected, pieces))
        return "\n".join(lines)


def accumulate(these: Any, others: Any) -> None:
    """Add the counts, columns and lists that `others` holds to those of `these`, in place."""
    for name, value in vars(others).items():
        own = getattr(these, name)
        if isinstance(own, Counter):
            own.update(value)
        elif isinstance(own, int | float):
            setattr(these, name, own + value)
        elif hasattr(own, "extend"):
            own.extend(value)
        else:
            accumulate(own, value)


def balance(read: int, kept: int, rejected: Counter, pieces: str = "") -> str:
    """One account on one line."""
    reasons = f": {listed(rejected)}" if +rejected else ""
    return f"read {read:,} · kept {kept:,}{pieces} · rejected {rejected.total():,}{reasons}"


def listed(counts: Counter) -> str:
    """The counts that are not zero, largest first."""
    order = sorted((+counts).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count:,}" for name, count in order)


def write_account(
    outputs: Outputs, path: str, args, inputs, account: Account, damages: list[str], seconds: float
) -> None:
    """Write the account beside the output `path`, as `PATH.account`, for later reports.

    It names files relative to its own folder.
    """
    folder = os.path.dirname(path)
    skipped = ("inputs", "out", "rejected", "workers")
    options = {name: value for name, value in vars(args).items() if name not in skipped}
    record = {
        "stage": os.path.basename(sys.argv[0]),
        "inputs": [seen_from(folder, source) for source in inputs],
        "rejected_file": args.rejected and seen_from(folder, args.rejected),
        "options": options,
        "seconds": round(seconds, 1),
        "damages": damages,
        **{k: dict(+v) if isinstance(v, Counter) else v for k, v in vars(account).items()},
    }
    outputs.open(path + ".account").write(dump(record) + b"\n")


def seen_from(folder: str, path: str) -> str:
    """`path` relative to `folder`; either may be given through links."""
    place, name = os.path.split(path)
    return os.path.relpath(os.path.join(os.path.realpath(place), name), os.path.realpath(folder))
