"""How benchmarks/gpu_16gb.py runs: what it needs, what it keeps, and the workers that it asks."""

import json
import os
import textwrap
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import gpu_16gb
from benchmarks.gpu.report.results import Results
from benchmarks.gpu.workers import imports, process
from llama_lora.cli import InputError
from tests.conftest import ROOT, run_script

STEPS = 1


# ---- What is missing ----


def test_what_is_missing_or_too_old_is_told_before_a_base_is_made(tmp_path):
    old = tmp_path / "transformers-5.17.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.17.0\n")
    (tmp_path / "peft.py").write_text("import what_peft_needs\n")
    own = "benchmarks/gpu_16gb.py", "--shape", "tiny", "--cache", tmp_path / "cache"
    done = run_script(*own, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: transformers 5.17.0: expected 5.23 or newer",
        "error: peft cannot be imported: ModuleNotFoundError: No module named 'what_peft_needs'",
    ]
    assert not (tmp_path / "cache/tiny").exists()


def test_missing_packages():
    assert imports.lacking("no-such-package", "1.2") == (
        "no-such-package: not installed, expected 1.2 or newer"
    )
    assert imports.lacking("torch", "2.11") == ""
    assert imports.numbers("2.11.0+cu130") == (2, 11, 0) < imports.numbers("2.13")
    assert imports.missing() == []


ONLY_THE_NEEDED = """
import importlib.metadata as metadata, re, sys
from packaging.requirements import Requirement

def canonical(name):
    return re.sub("[-_.]+", "-", name).lower()

todo, needed = ["torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy"], set()
while todo:
    name = canonical(todo.pop())
    try:
        requirements = map(Requirement, metadata.requires(name) or [])
    except metadata.PackageNotFoundError:
        continue
    if name not in needed:
        needed.add(name)
        extra = {"extra": ""}
        todo += [one.name for one in requirements if not one.marker or one.marker.evaluate(extra)]
hidden = {
    module
    for module, owners in metadata.packages_distributions().items()
    if not needed & set(map(canonical, owners))
} - {"llama_lora"}

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in hidden:
            return self.finder.find_spec(name, path, target)
    def find_distributions(self, *context):
        found = getattr(self.finder, "find_distributions", lambda *_: ())(*context)
        return (one for one in found if canonical(one.name) in needed)

sys.meta_path = list(map(Hiding, sys.meta_path))
"""


def test_no_more_than_the_libraries_of_training_is_needed(tmp_path):
    """Everything is hidden that torch, transformers, peft and bitsandbytes do without."""
    (tmp_path / "sitecustomize.py").write_text(ONLY_THE_NEEDED)
    rows = "ours NF4 512 × 14", "reference int8 512 × 14", "NF4, answers", "context, 7B NF4"
    own = "--shape", "tiny", "--steps", STEPS, "--cache", tmp_path / "cache", "--minutes", 5
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = run_script("benchmarks/gpu_16gb.py", *own, "--only", *rows, env=env)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "cache/results").glob("*.json")
    told = json.loads(path.read_text())
    statuses = {name: row.get("note", row["status"]) for name, row in told["rows"].items()}
    assert statuses == dict.fromkeys(statuses, "measured")
    assert len(statuses) == 6


# ---- A run ----


def test_what_there_is_no_time_for_remains(results, capsys):
    told, args = results
    worker = process.Worker(args.cache / "log", deadline=0)
    (job, *_) = told.jobs()
    gpu_16gb.measure(job, worker, told, args)
    assert worker.process is None
    assert told.rows == {}
    gpu_16gb.tell_what_remains(told)
    assert f"{len(told.wanted)} of {len(told.wanted)} remain: python3 " in capsys.readouterr().out
    assert "not measured yet" in told.page.read_text()


def test_results_of_other_settings_are_not_mixed(results):
    told, args = results
    args.resume = True
    assert Results(args, told.device, []).missing() == told.missing()
    args.gib = 8
    with pytest.raises(InputError, match="made with"):
        Results(args, told.device, [])


def test_a_search_that_was_cut_off_keeps_what_it_found_and_begins_anew(results):
    told, args = results
    args.only, args.resume = ["longest context, 7B NF4"], True
    (search,) = Results(args, told.device, []).missing()
    figures = {"tokens": 45_000, "fails_at": None, "peak": 1e9, "planned": 1e9}
    figures |= {"tokens_per_second": 9, "whole_conversations": 1.0, "set_up": ["as said"]}
    told.add({"row": search.as_dict(), "status": "searching", **figures})
    text = told.page.read_text()
    assert "| 7B NF4 | 45,000 or more |" in text
    assert "| 7B NF4, r=32: 40,000 tokens of context | 45,000 or more | yes |" in text
    later = Results(args, told.device, [])
    assert later.missing() == [search]
    assert later.rows[search.name]["tokens"] == 45_000


def test_a_failed_row_says_why_and_is_tried_again(results):
    told, args = results
    (row, *rest) = told.missing()
    told.fail([row.as_dict()], "the last line of its log")
    assert told.missing() == rest
    assert "failed" in told.page.read_text()
    args.resume = True
    assert Results(args, told.device, []).missing() == [row, *rest]


def test_rows_stand_in_one_order_whatever_was_measured_first(results):
    told, _ = results
    names = ["ours int8 512 × 14", "reference NF4 512 × 14", "reference NF4 512 × 7"]
    names.sort(key=told._place)
    told.rows = {name: {} for name in reversed(names)}
    assert list(told.as_dict()["rows"]) == names


def test_a_row_that_did_not_fit_goes_on_with_fewer_rows(results):
    told, _ = results
    row = next(row for row in told.missing() if row.batch == 4)
    asked = row
    for batch in (4, 2, 1):
        assert (told._left(asked).name, told._left(asked).batch) == (row.name, batch)
        told.add({"row": row.as_dict(), "status": "out of memory", "note": "as said"})
        row = row.halved()
    assert told._left(asked) is None


# ---- Workers ----


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A worker whose answers are written in Python."""

    def made(answers: str, seconds: float = 60):
        mark = f"mark = {process.MARK!r}\n"
        (tmp_path / "stand_in.py").write_text(mark + textwrap.dedent(answers))
        monkeypatch.setattr(process, "MODULE", "stand_in")
        monkeypatch.setattr(process, "environment", lambda: {**os.environ, "PYTHONPATH": path})
        return process.Worker(tmp_path / "log", time.monotonic() + seconds)

    path = str(tmp_path)
    return made


def test_a_worker_answers_again_and_again(worker):
    echo = """
        import os, json
        while line := input():
            print("a library", end="")
            print(f"\\n{mark}" + json.dumps({"process": os.getpid(), "asked": json.loads(line)}))
            print(mark + json.dumps({"held": 2 ** 30 * (json.loads(line) == {"last": 1})}))
    """
    asking = worker(echo)
    requests = [{"a": 1}, {"last": 1}, {"b": 2}]
    found = [next(iter(list(asking.ask(request)))) for request in requests]
    assert [one["asked"] for one in found] == requests
    first, second, third = (one["process"] for one in found)
    assert first == second != third  # the one that held too much was replaced
    asking.end()


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ('print(mark + \'{"failed": "ValueError: a reason"}\')', "ValueError: a reason"),
        ("raise SystemExit('the last words')", "the last words"),
        ("import os; os.kill(os.getpid(), 9)", "killed, as the system does"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\n'); sys.exit('bytes')", "bytes"),
    ],
)
def test_why_a_worker_did_not_answer(worker, answers, why):
    asking = worker(f"input()\n{answers}")
    assert list(asking.ask({"a": 1})) == []
    assert not asking.answered
    assert asking.problem().startswith(why)


def test_what_a_worker_started_ends_with_it(worker, tmp_path):
    asking = worker(
        """
        import subprocess, time
        child = subprocess.Popen(["sleep", "600"])
        print(mark + '{"child": %d}' % child.pid, flush=True)
        time.sleep(600)
        """
    )
    answers = asking.ask({"a": 1})
    found = next(answers)
    answers.close()
    state = Path(f"/proc/{found['child']}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def test_a_worker_is_cut_off_in_time(worker):
    asking = worker("import time; time.sleep(600)")
    assert list(asking.ask({"a": 1}, seconds=0.5)) == []
    assert asking.timed_out
    assert asking.problem() == "no time was left for it"


def test_a_worker_that_dies_loses_the_row_that_it_had_begun(results, worker):
    told, _ = results
    rows = [row for row in told.missing() if row.batch > 4]
    one, two = rows
    asking = worker(
        """
        import json
        rows = json.loads(input())["rows"]
        print(mark + json.dumps({"begins": rows[0]}))
        if rows[0]["batch"] == 14:
            raise SystemExit("the end")
        print(mark + json.dumps({"row": rows[0], "status": "out of memory", "note": ""}))
        print(mark + json.dumps({"held": 0}))
        """
    )
    gpu_16gb.measure(rows, asking, told, Namespace(cache="", shape="tiny", gib=1, steps=1))
    assert told.rows[one.name]["status"] == "failed"
    assert told.rows[one.name]["note"] == "the end"
    assert told.rows[two.name]["status"] == "out of memory"
