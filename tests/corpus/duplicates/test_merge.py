"""Merging: formats told apart, shuffled, limited, and a share held out."""

import json
import os
import random
from functools import partial

import pytest

from llama_lora.cli import InputError
from llama_lora.corpus.duplicates.merge import choose
from llama_lora.corpus.engine import stage
from llama_lora.hardware.device import cores
from tests.conftest import run_here
from tests.corpora import conversation, save
from tests.corpus.stages import MERGE, run


def test_formats_are_told_apart_by_content_and_counted(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    items = [
        conversation("a", "q", "a"),
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "source": "x"},
        {"instruction": "Hello", "input": "", "output": "Hi", "system": "s"},
        {"messages": [*messages, {"role": "assistant", "content": parts}]},
        {"id": "e", "items": conversation("", "q", "a")["conversations"]},
    ]
    kept, _, printed = run(MERGE, items, tmp_path)
    texts = [[(t["from"], t["value"]) for t in item["conversations"]] for item in kept]
    assert texts == [
        [("human", "q"), ("gpt", "a")],
        [("human", "Add.\n\n1 and 2"), ("gpt", "3")],
        [("system", "s"), ("human", "Hello"), ("gpt", "Hi")],
        [("system", "s"), ("human", "q"), ("gpt", "a\n\nb")],
        [("human", "q"), ("gpt", "a")],
    ]
    assert kept[1]["source"] == "x"
    assert "Alpaca 2, OpenAI messages 1, ShareGPT 1, ShareGPT export 1" in printed


def test_shuffle_limit_and_a_held_out_share(tmp_path):
    items = [conversation(f"c{i}", f"question {i // 2}", "answer") for i in range(200)]
    flags = ("--shuffle", 3, "--limit", 100, "--split-eval", 0.1)
    kept, rejected, printed = run(MERGE, items, tmp_path, *flags)
    held = json.loads((tmp_path / "out.eval.json").read_text())
    assert (len(kept), len(held), len(rejected)) == (90, 10, 100)
    assert "held out: 10" in printed
    order = [item["id"] for item in kept + held]
    assert order != sorted(order)
    assert len(set(order)) == 100
    ask = lambda part: {item["conversations"][0]["value"] for item in part}  # noqa: E731
    assert not ask(kept) & ask(held)  # the two with one question are on one side
    assert run(MERGE, items, tmp_path, *flags)[0] == kept


def test_what_cleaning_makes_equal_stays_on_one_side(tmp_path):
    """Each chat is there twice: as it was exported, and as text."""
    page = '<div class="markdown prose"><p>A <strong>kettle</strong> number {}.</p></div>'
    texts = [
        (f"page{i}", "text" if twin else "html", page.format(i))
        for i in range(40)
        for twin in (False, True)
    ]
    items = [
        conversation(f"{kind}-{name}", f"What is {name}?", html)
        if kind == "html"
        else conversation(
            f"{kind}-{name}", f"What is {name}?\n", f"A **kettle** number {name[4:]}."
        )
        for name, kind, html in texts
    ]
    kept, *_ = run(MERGE, items, tmp_path, "--split-eval", 0.2)
    held = json.loads((tmp_path / "out.eval.json").read_text())
    sides = [{item["id"].partition("-")[2] for item in part} for part in (kept, held)]
    assert len(held) >= 16
    assert not sides[0] & sides[1]


def test_at_least_one_conversation_is_held_out_and_never_all():
    draw = partial(random.Random, 1)
    assert len(choose(list(range(20)), list(range(20)), 0.02, draw())) == 1
    for group_of in ([0] * 20, [0], []):
        with pytest.raises(InputError, match="cannot be held out"):
            choose(group_of, list(range(len(group_of))), 0.02, draw())


def test_processes_are_started_only_to_compare_or_if_asked(tmp_path, monkeypatch):
    started, whole = [], stage.Pool
    monkeypatch.setattr(stage, "CHUNK_BYTES", 1)
    monkeypatch.setattr(stage, "Pool", lambda *given: started.append(given) or whole(*given))
    items = [conversation(f"c{i}", f"question {i}", "answer") for i in range(8)]
    for flags, expected in (((), 0), (("--workers", 2), 1), (("--split-eval", 0.5), cores() > 1)):
        run(MERGE, items, tmp_path, *flags)
        assert len(started) == expected
        started.clear()


def test_what_is_rejected_is_not_written_over_an_input(tmp_path):
    items = [conversation("a", "q", "a")]
    source, link = save(tmp_path / "in.json", items), tmp_path / "link"
    link.symlink_to(source)
    done = run_here(MERGE, "--in", source, "--out", tmp_path / "out.json", "--rejected", link)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--rejected would replace this input" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["in.json", "link"]
    assert json.loads(source.read_text()) == items
