"""How the benchmarks of training arrange what they measured, without training anything."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks import training_runs as runs
from benchmarks.training import beside_packers, learning
from benchmarks.training.pace import Corpus

CORPUS = Corpus(
    "ShareGPT", 512, Path("corpus.json"), pieces=6, tokens=2000, labelled=1000, attended=900_000
)


def trained(seconds_per_step: float, output: str = "", peak: int = 2**30) -> runs.Run:
    """A run of three steps after one that took longer."""
    entries = [
        {"step": i + 1, "seconds": 9 + seconds_per_step * i, "peak_memory_bytes": peak}
        for i in range(4)
    ]
    for entry in entries:
        entry["labelled_tokens"] = 10 * entry["step"]
    return runs.Run(entries, output, seconds=60)


# ---- Speed beside trainers that pack ----


@pytest.fixture
def packers(monkeypatch):
    """Ours and two others on a corpus; what each run of theirs would have printed."""
    args = Namespace(repeats=2, tokens=1024, steps=4, cache=Path("cache"))
    epoch = {"rows": 6, "tokens": 2001, "labelled_tokens": 1200}
    outputs = {
        "ours": "6 examples in 2 micro-batches of 2 × 512 tokens, 97.7% full",
        "llama-factory": "data " + json.dumps(epoch),
        "trl": "data " + json.dumps(epoch | {"rows": 4}),
    }
    paces = {"ours": [2, 2], "llama-factory": [4, 2], "trl": [5, 5]}
    order = []

    def run(name, corpus, args):
        order.append(name)
        return trained(paces[name][order.count(name) - 1], outputs[name])

    monkeypatch.setattr(beside_packers, "run", run)
    return beside_packers.compare(CORPUS, args), order, args


def test_packers_take_turns(packers):
    _, order, _ = packers
    assert order == ["ours", "llama-factory", "trl"] * 2


def test_rates_are_of_an_epoch_of_the_whole_corpus(packers):
    """Each trainer's steps of 1,024 tokens, at its mean pace, for the same 1,000 answer tokens."""
    found = packers[0]["packers"]
    assert found["ours"]["labelled tokens/s"] == pytest.approx(1000 / (2 * 2))
    assert found["llama-factory"]["labelled tokens/s"] == pytest.approx(1000 / (3 * 3))
    assert found["trl"]["labelled tokens/s"] == pytest.approx(1000 / (2 * 5))
    assert found["llama-factory"]["own labels/s"] == pytest.approx(1200 / (3 * 3))
    assert found["llama-factory"]["tokens/s"] == pytest.approx(2001 / (3 * 3))
    assert found["llama-factory"]["fill"] == pytest.approx(2001 / (3 * 1024))


def test_the_table_tells_how_much_faster_ours_was_in_each_pair(packers):
    found, _, args = packers
    rows = [line for line in beside_packers.text([found], args).splitlines() if "| 512" in line]
    assert [row.split(" | ")[1] for row in rows] == ["ours", "LLaMA-Factory", "TRL"]
    assert "| 2.25× (3.00, 1.50) |" in rows[1]
    assert "| 2.50× (2.50, 2.50) |" in rows[2]


def test_a_section_is_written_again_and_the_others_stay(tmp_path):
    args = Namespace(write=True, page=tmp_path / "page.md")
    args.page.write_text("# Page\n\nBefore.\n\n## One\n\nOld.\n\n## One more\n\nStays.\n")
    pages.publish_section(args, "One", "New.", "And more.")
    one = "# Page\n\nBefore.\n\n## One\n\nNew.\n\nAnd more.\n\n## One more\n\nStays.\n"
    assert args.page.read_text() == one
    pages.publish_section(args, "Two", "Last.")
    assert args.page.read_text() == one + "\n## Two\n\nLast.\n"
    pages.publish_section(args, "Two", "Last again.")
    assert args.page.read_text() == one + "\n## Two\n\nLast again.\n"


# ---- Learning in equal time ----


@pytest.fixture
def asked(tmp_path):
    args = Namespace(cache=tmp_path, base=tmp_path / "base", length=512, quantization="none")
    args.again, args.probe_steps, args.seeds, args.pair_minutes = False, 3, [1, 2], 1
    return args


@pytest.fixture
def trainings(monkeypatch):
    """What is trained, as it is asked for: who, part, seed and steps."""
    begun = []

    def run(training, data, args, steps, *flags):
        begun.append((training.name, training.part, training.seed, steps))
        training.folder(args).mkdir(parents=True, exist_ok=True)
        return trained(2.0)

    monkeypatch.setattr(learning.Training, "run", run)
    monkeypatch.setattr(learning, "adapted", lambda args, out: out.name)
    monkeypatch.setattr(learning, "held_out_loss", lambda model, *_: float(len(model)))
    return begun


def test_a_probe_decides_how_many_steps_end_with_the_time(trainings, asked):
    """9 s for the first step and 2 s for each after it: 26 more fit best into a minute."""
    learning.outcome(learning.Training("trl", 1, 1, 1.0), ["one"], [{}], asked)
    assert trainings == [("trl", 1, 1, 4), ("trl", 1, 1, 27)]


def test_a_run_of_one_step_tells_no_pace(trainings, asked):
    single = trained(2.0)
    single.entries = single.entries[:1]
    learning.outcome(learning.Training("trl", 1, 1, 1.0), ["one"], [{}], asked, single)
    assert trainings == [("trl", 1, 1, 4), ("trl", 1, 1, 27)]


def test_what_was_trained_is_kept_by_seed_part_time_and_dtype(trainings, asked, monkeypatch):
    data, pace = ["one", "two"], trained(2.0)

    def train(*told):
        learning.outcome(learning.Training("ours", *told), data, [{}], asked, pace)
        return len(trainings)

    assert train(1, 1, 1.0) == train(1, 1, 1.0) == 1
    assert train(1, 2, 1.0) == 2
    assert train(2, 2, 1.0) == 3
    assert train(2, 2, 2.0) == train(2, 2, 2.0) == 4
    monkeypatch.setenv("LLAMA_LORA_DTYPE", "bfloat16")
    assert train(2, 2, 2.0) == 5
    asked.again = True
    assert train(2, 2, 2.0) == 6


def test_a_training_is_measured_again_only_when_it_or_the_pieces_are_new(
    trainings, asked, monkeypatch
):
    measured = []

    def held_out_loss(model, held_out, args):
        measured.append(len(held_out))
        return 1.5

    monkeypatch.setattr(learning, "held_out_loss", held_out_loss)
    training, pace = learning.Training("ours", 1, 1, 1.0), trained(2.0)
    for pieces in (3, 3, 4):
        found = learning.outcome(training, ["one"], [{}] * pieces, asked, pace)
        assert found.loss == 1.5
    assert measured == [3, 4]


def test_pairs_take_turns_on_each_part_with_each_seed(trainings, asked):
    pace = {"ours": trained(2.0), "trl": trained(3.0)}
    pairs = learning.compare("trl", pace, ["one", "two"], [{}], asked)
    assert list(pairs) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    steps = {"ours": 27, "trl": 18}
    order = ["trl", "ours", "ours", "trl"] * 2
    expected = [
        (name, *pair, steps[name])
        for pair, names in zip(pairs, zip(order[::2], order[1::2], strict=True), strict=True)
        for name in names
    ]
    assert trainings == expected


def test_pairs_are_told_one_by_one_and_on_average():
    losses = {(1, 42): (1.5, 1.75), (2, 42): (1.25, 1.0)}
    pairs = {
        pair: {
            name: learning.Outcome(trained(1.0), loss)
            for name, loss in zip(("ours", "trl"), both, strict=True)
        }
        for pair, both in losses.items()
    }
    rows = [list(row.values()) for row in learning.pair_rows("trl", pairs)]
    assert rows == [
        [1, 42, "1.5000", "1.7500", "0.2500"],
        [2, 42, "1.2500", "1.0000", "-0.2500"],
        ["mean", "", "1.3750", "1.3750", "0.0000"],
    ]
