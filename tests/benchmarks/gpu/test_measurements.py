"""What benchmarks/gpu_16gb.py measures and tells, with a tiny base on the CPU: all but CUDA."""

import json
from argparse import Namespace
from contextlib import nullcontext

import pytest

from benchmarks import pages
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu.contenders import answers, base, lengths, ours, reference
from benchmarks.gpu.contenders.contender import DROPOUT
from benchmarks.gpu.report import aims, markdown_page
from benchmarks.gpu.workers import checks, worker
from tests.benchmarks.gpu.conftest import named
from tests.conftest import ROOT, run_script

STEPS = 1
RANDOM_LOSS = 6.24  # ln 512: of words that are all as likely


@pytest.fixture
def work(made_base):
    """Measure rows as a worker does, in this process."""

    def run(*names: str, gib: float = 16) -> list[dict]:
        every = named(gpu_rows)
        request = {"cache": str(made_base.parents[1]), "shape": "tiny", "gib": gib, "steps": STEPS}
        request["rows"] = [every[name].as_dict() for name in names]
        return [found for found in worker.answer(request) if "begins" not in found]

    return run


def test_a_made_base_is_one_that_the_project_loads(made_base):
    from llama_lora.model.base import load_base
    from llama_lora.model.folder.shape import shape_of
    from llama_lora.model.template import load_tokenizer

    model = load_base(made_base)
    assert sum(p.numel() for p in model.parameters()) == shape_of(made_base).parameters
    assert all(p.isfinite().all() and p.any() for p in model.parameters())
    assert len(load_tokenizer(made_base)) == model.config.vocab_size


def test_a_made_base_is_made_anew_for_other_sizes(made_base, tmp_path):
    make, kind = base.make, gpu_rows.KINDS["tiny"]["7B"]
    folder = tmp_path / "base"
    make(folder, kind)
    before = (folder / "config.json").stat().st_mtime_ns
    make(folder, kind)
    assert (folder / "config.json").stat().st_mtime_ns == before
    make(folder, type(kind)({**kind.config, "num_hidden_layers": 3}))
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3


def test_lengths_are_those_of_pieces():
    for window in (512, 1024, 2048, 4096):
        pieces = lengths.pieces(window, 1, 32000)
        assert len(pieces) == 600
        assert max(pieces.lengths) <= window
        assert 0.3 < sum(pieces.lengths) / len(pieces) / window < 1
        assert 0.3 < pieces.labelled / sum(pieces.lengths) < 1
    assert lengths.within(1) == 0
    assert lengths.within(10**6) == 1


def test_every_row_has_a_name_and_a_job_of_its_own():
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


def test_what_tells_most_stands_first():
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


def test_the_reference_learns_from_padded_rows(work):
    _, row = work("reference NF4 512 × 14")
    assert row["status"] == "measured"
    assert abs(row["loss"] - RANDOM_LOSS) < 0.5
    pieces = lengths.pieces(512, 16, 512)[:3]
    batch = reference.padded(pieces, 32)
    assert batch["input_ids"].shape == (3, 32)
    assert batch["attention_mask"].sum(1).tolist() == [len(piece.ids) for piece in pieces]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize("contender", ["ours", "reference"])
def test_answers_are_as_long_as_they_may_be(work, contender):
    _, row = work(f"{contender} 16-bit, answers")
    assert row["first_token"] > 0
    assert row["answer_tokens_per_second"] > 0
    assert row["answer_tokens"] == answers.TOKENS


def test_what_does_not_fit_is_told_and_the_reference_tried_with_less(work):
    ours = work("ours NF4 2,048 × 4", gib=0.01)
    assert [row["status"] for row in ours] == ["out of memory"]
    assert "loads" in ours[0]["note"]


def test_smaller_micro_batches():
    import torch

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
def test_the_search_ends_at_what_just_fits(limit):
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


def test_aims_are_judged():
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
    met = {aim: met for aim, _, met in aims.aims(results)}
    assert met["int8, 2,048 tokens: 3× reference's labelled tokens/s"] is False
    assert met["int8, 2,048 tokens: 1× unsloth's labelled tokens/s"] is True
    assert met["int8, 2,048 × 4 in the memory"] is True
    assert met["README's command, int8: at most 11 GB (10.24 GiB)"] is True
    assert met["half of the device's matrix-product peak"] is True
    assert met["the plan within 10% of the peak"] is False
    assert met["7B NF4, r=32: 40,000 tokens of context"] is None


def test_the_plan_of_the_command_is_told_as_it_is(tmp_path):
    from transformers import LlamaConfig

    from llama_lora.model.folder.shape import shape_of
    from llama_lora.train.plan import memory_plan

    kind = gpu_rows.KINDS["full"]["7B"]
    command = gpu_rows.Rows(gpu_rows.KINDS["full"]).command()
    LlamaConfig(architectures=["LlamaForCausalLM"], **kind.config).save_pretrained(tmp_path)
    shape = shape_of(tmp_path)
    setup = memory_plan.Setup(
        shape=shape,
        quantization=command.quantization,
        itemsize=2,
        targets=shape.targets(list(command.targets)),
        lora_r=command.rank,
        lora_dropout=DROPOUT,
        use_dora=False,
        optim=command.optim,
        tokens=command.length * command.batch,
        longest=command.length,
        recompute=command.recompute,
    )
    planned = pages.gib(memory_plan.plan(setup, 16 * 2**30).total)
    assert f"(the plan says {planned})" in (ROOT / "docs/results/README.md").read_text()


def test_a_command_writes_between_its_marks_alone(tmp_path, monkeypatch, capsys):
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


def test_a_card_is_not_asked_for_what_it_cannot_do_or_does_in_another_row():

    def rows(*capability):
        every = named(gpu_rows, "full").values()
        return [row for row in every if row.is_for(capability)]

    p100, t4, h200 = rows(6, 0), rows(7, 5), rows(9, 0)
    assert {row.contender for row in p100 if row.quantization == "8bit"} == {"ours"}
    assert {row.quantization for row in p100} == {"4bit", "8bit", "none"}
    assert {row.kernel for row in t4} == {"any"}
    assert len(h200) == len(named(gpu_rows, "full"))
    command = gpu_rows.Rows(gpu_rows.KINDS["full"]).command()
    (there,) = (job for job in gpu_rows.jobs(t4, "float16") if command in job)
    (elsewhere,) = (job for job in gpu_rows.jobs(h200, "bfloat16") if command in job)
    assert len(there) == 3  # of one dtype, so with one model
    assert len(elsewhere) == 1


def test_the_page_is_that_of_the_results():
    files = sorted((ROOT / "docs/results").glob("*.json"))
    found = [json.loads(path.read_text()) for path in files]
    assert (ROOT / "docs/gpu.md").read_text() == markdown_page.page(found)


def test_a_device_that_computes_wrong_is_told(made_base, monkeypatch):
    folder = base.made(made_base.parents[1], "tiny", "check")
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
