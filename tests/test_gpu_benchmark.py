"""benchmarks/gpu_16gb.py with a tiny base on the CPU: all of it but CUDA."""

import json
import os
import sys
import textwrap
import time
from argparse import Namespace
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from llama_lora.cli import InputError

STEPS = 1
RANDOM_LOSS = 6.24  # ln 512: of words that are all as likely


@pytest.fixture(scope="module")
def benchmark():
    """Import modules of benchmarks/, which is not installed."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield import_module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def base(benchmark, tmp_path_factory):
    return benchmark("gpu.base").made(tmp_path_factory.mktemp("gpu"), "tiny", "7B")


def named(rows, shape="tiny") -> dict:
    """The rows of a shape by their names."""
    every = rows.all_rows(rows.KINDS[shape])
    return {row.name: row for row in every if row != rows.CHECKS}


@pytest.fixture
def work(benchmark, base):
    """Measure rows as a worker does, in this process."""
    rows = benchmark("gpu.rows")

    def run(*names: str, gib: float = 16) -> list[dict]:
        every = named(rows)
        request = {"cache": str(base.parents[1]), "shape": "tiny", "gib": gib, "steps": STEPS}
        request["rows"] = [every[name].as_dict() for name in names]
        return [found for found in benchmark("gpu.worker").answer(request) if "begins" not in found]

    return run


def test_a_made_base_is_one_that_the_project_loads(base):
    from llama_lora.model.base import load_base
    from llama_lora.model.shape import shape_of
    from llama_lora.model.template import load_tokenizer

    model = load_base(base)
    assert sum(p.numel() for p in model.parameters()) == shape_of(base).parameters
    assert all(p.isfinite().all() and p.any() for p in model.parameters())
    assert len(load_tokenizer(base)) == model.config.vocab_size


def test_a_made_base_is_made_anew_for_other_sizes(benchmark, base, tmp_path):
    make, kind = benchmark("gpu.base").make, benchmark("gpu.rows").KINDS["tiny"]["7B"]
    folder = tmp_path / "base"
    make(folder, kind)
    before = (folder / "config.json").stat().st_mtime_ns
    make(folder, kind)
    assert (folder / "config.json").stat().st_mtime_ns == before
    make(folder, type(kind)({**kind.config, "num_hidden_layers": 3}))
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3


def test_lengths_are_those_of_pieces(benchmark):
    lengths = benchmark("gpu.lengths")
    for window in (512, 1024, 2048, 4096):
        pieces = lengths.pieces(window, 1, 32000)
        assert len(pieces) == 600
        assert max(pieces.lengths) <= window
        assert 0.3 < sum(pieces.lengths) / len(pieces) / window < 1
        assert 0.3 < pieces.labelled / sum(pieces.lengths) < 1
    assert lengths.within(1) == 0
    assert lengths.within(10**6) == 1


def test_every_row_has_a_name_and_a_job_of_its_own(benchmark):
    gpu_rows = benchmark("gpu.rows")
    rows = gpu_rows.all_rows(gpu_rows.KINDS["full"])
    assert len(named(gpu_rows, "full")) == len(rows) - 1
    jobs = gpu_rows.jobs(rows, "bfloat16")
    assert [row for job in jobs for row in ([job] if job == gpu_rows.CHECKS else job)] == rows
    for job in jobs:
        assert job == gpu_rows.CHECKS or len({row.job("bfloat16") for row in job}) == 1
    trained = [row for row in named(gpu_rows, "full").values() if row.measures == "speed"]
    for contender in ("ours", "reference"):
        found = {(r.quantization, r.window, r.batch) for r in trained if r.contender == contender}
        assert found >= {(one, *size) for one in ("4bit", "8bit") for size in gpu_rows.SIZES}
    assert rows[0] == gpu_rows.Row.of(json.loads(json.dumps(rows[0].as_dict())))


def test_what_tells_most_stands_first(benchmark):
    gpu_rows = benchmark("gpu.rows")
    rows = gpu_rows.all_rows(gpu_rows.KINDS["full"])
    kinds = [row if row == "checks" else (row.contender, row.quantization) for row in rows]
    first = [(who, bits) for bits in ("4bit", "8bit") for who in ("ours", "reference")]
    assert kinds[:5] == [*first, "checks"]
    assert [row.measures for row in rows[-3:]] == ["context"] * 3


def test_our_rows(work):
    loaded, command, plain, profiled = work(
        "ours int8 512 × 14, README's command", "ours int8 2,048 × 4"
    )
    assert set(loaded["checks"].values()) == {"holds"}
    assert command["recomputed"] == command["layers"] == 2
    assert command["planned"] > 0
    assert command["operations_per_second"] > command["useful_flops"]  # all is computed twice
    assert command["labelled_per_second"] < command["tokens_per_second"]
    assert plain["recomputed"] == 0
    assert abs(plain["loss"] - RANDOM_LOSS) < 0.5
    assert profiled["operators"][0][2] > 0


def test_the_longest_context_of_a_small_base_is_the_most_that_is_tried(work):
    *_, last = work("longest context, 7B NF4")
    assert last["tokens"] == last["row"]["length"]
    assert last["fails_at"] is None
    assert 0 < last["whole_conversations"] < 1


def test_the_reference_learns_from_padded_rows(benchmark, work):
    _, row = work("reference NF4 512 × 14")
    assert row["status"] == "measured"
    assert abs(row["loss"] - RANDOM_LOSS) < 0.5
    pieces = benchmark("gpu.lengths").pieces(512, 16, 512)[:3]
    batch = benchmark("gpu.reference").padded(pieces, 32)
    assert batch["input_ids"].shape == (3, 32)
    assert batch["attention_mask"].sum(1).tolist() == [len(piece.ids) for piece in pieces]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize("contender", ["ours", "reference"])
def test_answers_are_as_long_as_they_may_be(benchmark, work, contender):
    _, row = work(f"{contender} 16-bit, answers")
    assert row["first_token"] > 0
    assert row["answer_tokens_per_second"] > 0
    assert row["answer_tokens"] == benchmark("gpu.answers").TOKENS


def test_what_does_not_fit_is_told_and_the_reference_tried_with_less(work):
    ours = work("ours NF4 2,048 × 4", gib=0.01)
    assert [row["status"] for row in ours] == ["out of memory"]
    assert "loads" in ours[0]["note"]


def test_smaller_micro_batches(benchmark):
    import torch

    gpu_rows, worker = benchmark("gpu.rows"), benchmark("gpu.worker")
    row = named(gpu_rows)["reference int8 2,048 × 4"]

    class Small:
        def measure(self, row):
            if row.batch > 1:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has none"
                )
            yield {"labelled_per_second": 1}

    card = Namespace(start=lambda: None)
    found = [one for one in worker.attempts(Small(), row, card) if "begins" not in one]
    assert [(one["row"]["name"], one["status"]) for one in found] == [
        ("reference int8 2,048 × 4", "out of memory"),
        ("reference int8 2,048 × 2", "out of memory"),
        ("reference int8 2,048 × 1", "measured"),
    ]
    assert found[0]["note"] == "CUDA out of memory. Tried to allocate 1 GiB"


@pytest.mark.parametrize("limit", [100, 1000, 2500, 5000])
def test_the_search_ends_at_what_just_fits(benchmark, limit):
    ours = benchmark("gpu.ours")
    fits, fails, tokens, tries = 0, None, 1024, 0
    while tokens:
        if tokens <= limit:
            fits = tokens
        else:
            fails = tokens
        tokens, tries = ours.next_try(fits, fails, 4096, 16), tries + 1
    assert fits == min(4096, fits)
    assert limit * (1 - ours.NEAR) - 16 <= fits <= limit or fits == 4096
    assert tries <= 14


def test_aims_are_judged(benchmark):
    def row(name, contender, quantization="8bit", window=2048, **values):
        asked = {"name": name, "contender": contender, "quantization": quantization}
        asked |= {"window": window, "batch": 4, "kernel": "any", "base": "7B"}
        return {"row": asked, "status": "measured", **values}

    rows = [
        row("ours int8 512 × 14, README's command", "ours", window=512, peak=10.5e9, planned=12e9),
        row("ours int8 2,048 × 4", "ours", labelled_per_second=2900, useful_flops=4e14),
        row("reference int8 2,048 × 2", "reference", labelled_per_second=1000),
        row("unsloth int8 2,048 × 4", "unsloth", labelled_per_second=2900),
    ]
    rows[1] |= {"peak": 15e9, "parts": 1}
    rows[0]["labelled_per_second"] = 1
    rows[0]["useful_flops"] = 1
    results = {"rows": {r["row"]["name"]: r for r in rows}, "device": {"peak_flops": 7e14}}
    met = {aim: met for aim, _, met in benchmark("gpu.aims").aims(results)}
    assert met["int8, 2,048 tokens: 3× reference's labelled tokens/s"] is False
    assert met["int8, 2,048 tokens: 1× unsloth's labelled tokens/s"] is True
    assert met["int8, 2,048 × 4 in the memory"] is True
    assert met["README's command, int8: at most 11 GB (10.24 GiB)"] is True
    assert met["half of the device's matrix-product peak"] is True
    assert met["the plan within 10% of the peak"] is False
    assert met["7B NF4, r=32: 40,000 tokens of context"] is None


def test_the_plan_of_the_command_is_told_as_it_is(benchmark, tmp_path):
    from transformers import LlamaConfig

    from llama_lora.model.shape import shape_of
    from llama_lora.train import plan

    gpu_rows = benchmark("gpu.rows")
    kind = gpu_rows.KINDS["full"]["7B"]
    command = gpu_rows.Rows(gpu_rows.KINDS["full"]).command()
    LlamaConfig(architectures=["LlamaForCausalLM"], **kind.config).save_pretrained(tmp_path)
    shape = shape_of(tmp_path)
    setup = plan.Setup(
        shape=shape,
        quantization=command.quantization,
        itemsize=2,
        targets=shape.targets(list(command.targets)),
        lora_r=command.rank,
        lora_dropout=benchmark("gpu.contender").DROPOUT,
        use_dora=False,
        optim=command.optim,
        tokens=command.length * command.batch,
        longest=command.length,
        recompute=command.recompute,
    )
    planned = benchmark("pages").gib(plan.plan(setup, 16 * 2**30).total)
    assert f"(the plan says {planned})" in (ROOT / "docs/results/README.md").read_text()


def test_a_command_writes_between_its_marks_alone(benchmark, tmp_path, monkeypatch, capsys):
    pages = benchmark("pages")
    page = tmp_path / "page.md"
    mine, other = (f"<!-- {x}.py writes from here -->\nold\n<!-- to here -->\n" for x in "ab")
    page.write_text(f"before\n{mine}between\n{other}after\n")
    monkeypatch.setattr("sys.argv", ["/somewhere/a.py", "--write"])
    pages.publish_part(Namespace(page=page, write=False), "new")
    assert page.read_text() == f"before\n{mine}between\n{other}after\n"
    pages.publish_part(Namespace(page=page, write=True), "new", "```\na\n\nb\n```")
    part = mine.replace("\nold\n", "\n\nnew\n\n```\na\n\nb\n```\n\n")
    assert page.read_text() == f"before\n{part}between\n{other}after\n"


def test_without_a_card_it_says_what_to_do(tmp_path):
    done = run_script("benchmarks/gpu_16gb.py", "--cache", tmp_path, "--out", tmp_path)
    assert done.returncode == 1
    assert "--shape tiny" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_card_is_not_asked_for_what_it_cannot_do_or_does_in_another_row(benchmark):
    gpu_rows = benchmark("gpu.rows")

    def rows(*capability):
        every = named(gpu_rows, "full").values()
        return [row for row in every if row.is_for(capability)]

    p100, t4, h200 = rows(6, 0), rows(7, 5), rows(9, 0)
    assert {row.quantization for row in p100} == {"4bit", "none"}
    assert {row.kernel for row in t4} == {"any"}
    assert len(h200) == len(named(gpu_rows, "full"))
    command = gpu_rows.Rows(gpu_rows.KINDS["full"]).command()
    (there,) = (job for job in gpu_rows.jobs(t4, "float16") if command in job)
    (elsewhere,) = (job for job in gpu_rows.jobs(h200, "bfloat16") if command in job)
    assert len(there) == 3  # of one dtype, so with one model
    assert len(elsewhere) == 1


def test_the_page_is_that_of_the_results(benchmark):
    files = sorted((ROOT / "docs/results").glob("*.json"))
    found = [json.loads(path.read_text()) for path in files]
    assert (ROOT / "docs/gpu.md").read_text() == benchmark("gpu.page").page(found)


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


def test_missing_packages(benchmark):
    imports = benchmark("gpu.imports")
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


@pytest.fixture
def results(benchmark, tmp_path):
    """Of a run in which nothing was measured yet, and no base was made."""
    args = Namespace(shape="tiny", gib=16, steps=1, only=["reference NF4"], resume=False)
    args.cache, args.out, args.unsloth = tmp_path, tmp_path / "out", sys.executable
    device = {"name": "CPU", "capability": None, "peak_flops": 1e9, "planner_rate": 1e9}
    device |= {"cuda": None, "driver": None, "dtype": "float32"}
    return benchmark("gpu.results").Results(args, device, ["unsloth"]), args


def test_what_there_is_no_time_for_remains(benchmark, results, capsys):
    told, args = results
    command, process = benchmark("gpu_16gb"), benchmark("gpu.process")
    worker = process.Worker(args.cache / "log", deadline=0)
    (job, *_) = told.jobs()
    command.measure(job, worker, told, args)
    assert worker.process is None
    assert told.rows == {}
    command.tell_what_remains(told)
    assert f"{len(told.wanted)} of {len(told.wanted)} remain: python3 " in capsys.readouterr().out
    assert "not measured yet" in told.page.read_text()


def test_results_of_other_settings_are_not_mixed(benchmark, results):
    told, args = results
    args.resume = True
    again = benchmark("gpu.results").Results
    assert again(args, told.device, []).missing() == told.missing()
    args.gib = 8
    with pytest.raises(InputError, match="made with"):
        again(args, told.device, [])


def test_a_search_that_was_cut_off_keeps_what_it_found_and_begins_anew(benchmark, results):
    told, args = results
    args.only, args.resume = ["longest context, 7B NF4"], True
    (search,) = benchmark("gpu.results").Results(args, told.device, []).missing()
    figures = {"tokens": 45_000, "fails_at": None, "peak": 1e9, "planned": 1e9}
    figures |= {"tokens_per_second": 9, "whole_conversations": 1.0, "set_up": ["as said"]}
    told.add({"row": search.as_dict(), "status": "searching", **figures})
    text = told.page.read_text()
    assert "| 7B NF4 | 45,000 or more |" in text
    assert "| 7B NF4, r=32: 40,000 tokens of context | 45,000 or more | yes |" in text
    later = benchmark("gpu.results").Results(args, told.device, [])
    assert later.missing() == [search]
    assert later.rows[search.name]["tokens"] == 45_000


def test_a_failed_row_says_why_and_is_tried_again(benchmark, results):
    told, args = results
    (row, *rest) = told.missing()
    told.fail([row.as_dict()], "the last line of its log")
    assert told.missing() == rest
    assert "failed" in told.page.read_text()
    args.resume = True
    assert benchmark("gpu.results").Results(args, told.device, []).missing() == [row, *rest]


def test_rows_stand_in_one_order_whatever_was_measured_first(results):
    told, _ = results
    names = ["ours int8 512 × 14", "reference NF4 512 × 14", "reference NF4 512 × 7"]
    names.sort(key=told._place)
    told.rows = {name: {} for name in reversed(names)}
    assert list(told.as_dict()["rows"]) == names


def test_a_row_that_did_not_fit_goes_on_with_fewer_rows(benchmark, results):
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
def worker(benchmark, tmp_path, monkeypatch):
    """A worker whose answers are written in Python."""
    process = benchmark("gpu.process")
    package = tmp_path / "gpu"
    package.mkdir()
    (package / "__init__.py").touch()

    def made(answers: str, seconds: float = 60):
        mark = f"mark = {process.MARK!r}\n"
        (package / "worker.py").write_text(mark + textwrap.dedent(answers))
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


def test_a_worker_that_dies_loses_the_row_that_it_had_begun(benchmark, results, worker):
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
    benchmark("gpu_16gb").measure(
        rows, asking, told, Namespace(cache="", shape="tiny", gib=1, steps=1)
    )
    assert told.rows[one.name]["status"] == "failed"
    assert told.rows[one.name]["note"] == "the end"
    assert told.rows[two.name]["status"] == "out of memory"


def test_a_device_that_computes_wrong_is_told(benchmark, base, monkeypatch):
    checks = benchmark("gpu.checks")
    folder = benchmark("gpu.base").made(base.parents[1], "tiny", "check")
    assert checks.packed_beside_apart(folder, "none").startswith("right")
    assert checks.attention_beside_eager(folder).startswith("right")
    assert checks.lack_of_memory(folder).startswith("right")
    monkeypatch.setattr(checks, "little_memory", nullcontext)
    assert checks.lack_of_memory(folder).startswith("WRONG")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    attend = FUNCTIONS[checks.BY_EXAMPLE]

    def together(*args, example_lengths=None, **options):
        return attend(*args, example_lengths=[sum(example_lengths)], **options)

    monkeypatch.setitem(FUNCTIONS._global_mapping, checks.BY_EXAMPLE, together)
    assert checks.packed_beside_apart(folder, "none").startswith("WRONG")
