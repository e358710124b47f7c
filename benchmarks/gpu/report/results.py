"""What is to be measured, and all that was found, kept on disk."""

import argparse
import json
import re
from pathlib import Path

from benchmarks.gpu.rows import CHECKS, KINDS, SEARCHING, Row, all_rows, jobs
from benchmarks.machine import processor, today
from llama_lora.cli import InputError

DONE = "measured", "out of memory"  # what --resume need not try again
REST = "the other checks"
ROOT = Path(__file__).parents[3]


class Results:
    """All that was found, on disk after each finding.

    Attributes:
        wanted: the rows to measure, in their order, with `CHECKS` among them.
        rows: findings by the names of rows.
        checks: outcomes by the names of checks.
    """

    def __init__(self, args: argparse.Namespace, device: dict, absent: list[str]):
        """Go on where the last run ended with --resume; else begin anew, and lay that run aside.

        Args:
            device: what is known of it.
            absent: contenders that are not installed.
        """
        self.settings = {"shape": args.shape, "gib": args.gib, "steps": args.steps}
        self.device, self.absent, self.page = device, absent, page_of(args.out)
        self.path = args.out / f"{slug(device['name'], args.shape)}.json"
        every = all_rows(KINDS[args.shape])
        self.order = [row.name for row in every if row != CHECKS]
        self.wanted = chosen([row for row in every if self._can_be(row)], args)
        self.models, self.rows, self.checks, self.checked = {}, {}, {}, False
        self._told = ""
        if args.resume:
            self._go_on()
        elif self.path.is_file():
            self.path.replace(self.path.with_suffix(".json.old"))
        self.write()

    def _can_be(self, row: Row | str) -> bool:
        if row == CHECKS:
            return True
        return row.contender not in self.absent and row.is_for(self.device["capability"])

    def _go_on(self) -> None:
        """From what a run with the same settings measured before."""
        if not self.path.is_file():
            return
        told = json.loads(self.path.read_text())
        if told["settings"] != self.settings:
            raise InputError(f"{self.path}: made with {told['settings']}, not {self.settings}")
        kept = *DONE, SEARCHING
        self.rows = {name: row for name, row in told["rows"].items() if row["status"] in kept}
        self.models, self.checks, self.checked = told["models"], told["checks"], told["checked"]
        self.device = told["device"] | self.device

    def jobs(self) -> list[list[Row] | str]:
        """What is missing, by what one model is loaded for."""
        return jobs(self.missing(), self.device["dtype"])

    def missing(self) -> list[Row | str]:
        """What no run has ended; of a row that did not fit, the smaller one that is tried next."""
        return [left for one in self.wanted if (left := self._left(one))]

    def _left(self, one: Row | str) -> Row | str | None:
        if one == CHECKS:
            return None if self.checked else CHECKS
        status = self.rows.get(one.name, {}).get("status")
        if status == "out of memory" and one.can_be_halved:
            return self._left(one.halved())
        return None if status in (*DONE, "failed") else one

    @property
    def failed(self) -> list[str]:
        """Rows that the next run tries again."""
        return [name for name, row in self.rows.items() if row["status"] == "failed"]

    def add_rates(self, found: dict) -> None:
        """How fast the device computes products."""
        self.device |= found
        self.write()

    def add(self, findings: dict) -> None:
        if "loaded" in findings:
            self.models[", ".join(map(str, findings.pop("loaded")))] = findings
        else:
            name = findings["row"]["name"]
            self.rows[name] = findings
            self._tell(name, findings)
        self.write()

    def _tell(self, name: str, row: dict) -> None:
        """Print a row, unless that is what was printed last."""
        from benchmarks.gpu.report.markdown_page import line

        told = line(name, row)
        if told != self._told:
            print(told, flush=True)
        self._told = told

    def fail(self, rows: list[dict], note: str) -> None:
        for row in rows:
            self.add({"row": row, "status": "failed", "note": note})

    @property
    def checks_done(self) -> list[str]:
        """The names of those that need not be made again."""
        return [name for name, found in self.checks.items() if not found.startswith("failed")]

    def add_check(self, name: str, outcome: str) -> None:
        self.checks[name] = outcome
        print(f"{name} | {outcome}", flush=True)
        self.write()

    def end_checks(self, problem: str) -> None:
        """All were made, or a problem keeps the rest from being made."""
        self.checked = not problem
        self.checks.pop(REST, None)
        if problem:
            self.add_check(REST, f"failed: {problem}")
        self.write()

    def write(self) -> None:
        from llama_lora.corpus.records.atomic_files import replacing

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(str(self.path)) as file:
            file.write((json.dumps(self.as_dict(), indent=1) + "\n").encode())
        write_page(self.path.parent)

    def as_dict(self) -> dict:
        return {
            "device": self.device,
            "processor": processor(),
            "date": today(),
            "settings": self.settings,
            "absent": self.absent,
            "checked": self.checked,
            "checks": self.checks,
            "models": self.models,
            "rows": {name: self.rows[name] for name in sorted(self.rows, key=self._place)},
        }

    def _place(self, name: str) -> tuple[int, int]:
        """Where a row stands: beside those of its size, what is tried with fewer rows last."""
        sizes = [one.partition(" × ")[0] for one in self.order]
        known = self.order.index(name) if name in self.order else len(self.order)
        return sizes.index(name.partition(" × ")[0]), known


def chosen(rows: list[Row | str], args: argparse.Namespace) -> list[Row | str]:
    """Those with one of the texts of --only in their names."""
    if not args.only:
        return rows
    names = [row if row == CHECKS else row.name for row in rows]
    pairs = zip(rows, names, strict=True)
    found = [row for row, name in pairs if any(text in name for text in args.only)]
    if not found:
        raise InputError(f"--only {' '.join(args.only)}: no such row; there are {'; '.join(names)}")
    return found


def write_page(out: Path) -> Path:
    """Write the page of all files of results in a folder; where it is."""
    from benchmarks.gpu.report.markdown_page import page

    found = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    page_of(out).write_text(page(found), encoding="utf-8")
    return page_of(out)


def page_of(out: Path) -> Path:
    """Where the page of the results in a folder is."""
    ours = out.absolute() == ROOT / "docs/results"
    return ROOT / "docs/gpu.md" if ours else out / "gpu.md"


def slug(name: str, shape: str) -> str:
    """The name of the file for a device: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    named = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return named if shape == "full" else f"{named}-{shape}"
