"""What is to be measured, and all that was found, kept on disk."""

import argparse
import json
import re

from machine import processor, today

from gpu.page import line, page
from gpu.rows import KINDS, SEARCHING, Row, all_rows
from gpu.worker import versions
from llama_lora.cli import InputError

DONE = "measured", "out of memory"  # what --resume need not try again


class Results:
    """All that was found, on disk after each finding."""

    def __init__(self, args: argparse.Namespace, device: dict, absent: list[str]):
        """Begin anew, or with --resume where the last run ended.

        Args:
            device: what is known of it.
            absent: contenders that are not installed.
        """
        self.settings = {"shape": args.shape, "gib": args.gib, "steps": args.steps}
        self.device, self.absent = device, absent
        self.path = args.out / f"{slug(device['name'], args.shape)}.json"
        every = all_rows(KINDS[args.shape])
        self.order = [row.name for row in every]
        self.wanted = wanted([row for row in every if row.contender not in absent], args.only)
        self.rows, self.models = self._earlier() if args.resume else ({}, {})

    def _earlier(self) -> tuple[dict, dict]:
        """What a run with the same settings measured before."""
        if not self.path.is_file():
            return {}, {}
        told = json.loads(self.path.read_text())
        if told["settings"] != self.settings:
            raise InputError(f"{self.path}: made with {told['settings']}, not {self.settings}")
        kept = *DONE, SEARCHING
        rows = {name: row for name, row in told["rows"].items() if row["status"] in kept}
        return rows, told["models"]

    def _place(self, name: str) -> tuple[int, int]:
        """Where a row stands: beside those of its size, what is tried with fewer rows last."""
        sizes = [one.partition(" × ")[0] for one in self.order]
        known = self.order.index(name) if name in self.order else len(self.order)
        return sizes.index(name.partition(" × ")[0]), known

    def missing(self) -> list[Row]:
        begun = None, SEARCHING
        return [row for row in self.wanted if self.rows.get(row.name, {}).get("status") in begun]

    def add(self, findings: dict) -> None:
        if "loaded" in findings:
            self.models[", ".join(map(str, findings.pop("loaded")))] = findings
        else:
            name = findings["row"]["name"]
            self.rows[name] = findings
            print(line(name, findings), flush=True)
        self.write()

    def fail(self, rows: list[Row], status: str, note: str) -> None:
        for row in rows:
            self.add({"row": row.as_dict(), "status": status, "note": note})

    def write(self) -> None:
        from llama_lora.corpus.atomic import replacing

        self.path.parent.mkdir(parents=True, exist_ok=True)
        told = self.as_dict()
        files = {".json": json.dumps(told, indent=1) + "\n", ".md": page(told)}
        for suffix, text in files.items():
            with replacing(str(self.path.with_suffix(suffix))) as file:
                file.write(text.encode())

    def as_dict(self) -> dict:
        return {
            "device": self.device,
            "processor": processor(),
            "date": today(),
            "versions": versions(),
            "settings": self.settings,
            "absent": self.absent,
            "models": self.models,
            "rows": {name: self.rows[name] for name in sorted(self.rows, key=self._place)},
        }


def wanted(rows: list[Row], texts: list[str] | None) -> list[Row]:
    """Those with one of the texts in their names."""
    if not texts:
        return rows
    chosen = [row for row in rows if any(text in row.name for text in texts)]
    if not chosen:
        names = "; ".join(row.name for row in rows)
        raise InputError(f"--only {' '.join(texts)}: no such row; there are {names}")
    return chosen


def slug(name: str, shape: str) -> str:
    """The name of the files for a device: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    named = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return named if shape == "7b" else f"{named}-{shape}"
