"""What the tests of the corpus stages share: the scripts, run on a few conversations."""

import argparse
import json
import re

from tests.conftest import run_here
from tests.corpora import save

MERGE, CLEAN, FILTER = (
    f"fastchat/data/{name}.py" for name in ("merge", "clean_sharegpt", "optional_clean")
)
BALANCE = re.compile(r"read ([\d,]+) · kept ([\d,]+)(?: in [\d,]+ pieces)? · rejected ([\d,]+)(.*)")


def run(script, items, folder, *flags):
    """Run a script on `items`; its output, what it rejected, and the lines it printed."""
    source, out, rejected = (folder / name for name in ("in.json", "out.json", "rejected.jsonl"))
    save(source, items)
    done = run_here(script, "--in", source, "--out", out, "--rejected", rejected, *flags)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[-2:]:
        read, kept, gone, reasons = BALANCE.search(line).groups()
        number = [int(text.replace(",", "")) for text in (read, kept, gone)]
        assert number[0] == number[1] + number[2]
        counted = [
            int(count.replace(",", "")) for count in re.findall(r" ([\d,]+)(?:,|$)", reasons)
        ]
        assert sum(counted) == number[2]
    lines = rejected.read_text(encoding="utf-8").splitlines()
    return json.loads(out.read_text(encoding="utf-8")), [json.loads(x) for x in lines], done.stdout


def arguments(folder, items, **changed):
    source = save(folder / "in.json", items)
    plain = {"inputs": str(source), "out": str(folder / "out.json"), "rejected": None}
    plain |= {"workers": 1, "salvage": False, "begin": 0, "end": None}
    return argparse.Namespace(**{**plain, **changed})
