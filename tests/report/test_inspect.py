"""Looking at a corpus in the terminal: the figures are right, and what is wrong is one line."""

import json
import random
from collections import Counter

import pytest

from llama_lora.corpus.engine import stage
from llama_lora.model.labels import IGNORE
from llama_lora.model.template import Template
from llama_lora.train.data.examples import load_examples
from tests.conftest import run_here, run_script, shipped
from tests.corpora import conversation, save
from tests.corpus.stages import CLEAN
from tests.report.inspected import INSPECT, WINDOW, inspect


def rows(text):
    """The lines of the report by their names, from the second column on."""
    return {line[:18].strip(): line[18:].strip() for line in text.splitlines() if line.strip()}


def nearest_rank(values, share):
    """The smallest of the values that `share` percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(-(-share * len(ordered) // 100), 1) - 1]


def first_fit(lengths, room):
    """Rows by the definition of best fit decreasing, with no cleverness."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [n for n, left in enumerate(free) if left >= length]
        if fitting:
            free[min(fitting, key=free.__getitem__)] -= length
        else:
            free.append(room - length)
    return len(free)


def test_figures_of_a_split_file(chain, tokenizer_folder, llama_tokenizer):
    items = json.loads((chain / "split_long_conversation.json").read_text())
    template = Template(llama_tokenizer)
    _, audit = load_examples(str(chain / "split_long_conversation.json"), template, WINDOW)
    turns = [turn for item in items for turn in item["conversations"]]
    encoded = template.encode_batch(items)
    tokens = [len(one.ids) for one in encoded]
    labelled = [sum(label != IGNORE for label in one.labels) for one in encoded]
    measured = {
        "turns": [len(item["conversations"]) for item in items],
        "characters, question": [len(t["value"]) for t in turns if t["from"] == "human"],
        "characters, answer": [len(t["value"]) for t in turns if t["from"] == "gpt"],
        "tokens": tokens,
        "labelled tokens": labelled,
    }
    text = (chain / "report.txt").read_text()
    found = rows(text)
    roles = Counter(turn["from"] for turn in turns)
    assert found["roles"] == ", ".join(f"{role} {n}" for role, n in sorted(roles.items()))
    assert found["conversations"] == f"{len(items)} with {roles['human']} pairs"
    assert found["formats"] == f"ShareGPT {len(items)}"
    assert found["duplicates"] == "none"
    for name, values in measured.items():
        line = next(line for line in text.splitlines() if line.startswith(name + " "))
        figures = [int(cell.replace(",", "")) for cell in line.removeprefix(name).split()]
        shares = [nearest_rank(values, share) for share in (0, 5, 25, 50, 75, 95, 99, 100)]
        assert figures == [*shares, round(sum(values) / len(values))], name
    packs = first_fit(tokens, WINDOW)
    assert f"at {WINDOW} tokens: {audit}\n" in text
    assert f"an epoch: {packs} packs, {sum(tokens) / packs / WINDOW:.1%} full" in text


def test_what_is_beyond_the_window_is_counted_as_the_trainer_counts_it(
    chain, tokenizer_folder, llama_tokenizer
):
    path = chain / "optional_clean.json"
    done = inspect("--in", path, "--model-name", tokenizer_folder, "--max-length", 128)
    _, audit = load_examples(str(path), Template(llama_tokenizer), 128, allow_truncation=True)
    assert audit.truncated
    assert audit.unlabelled
    assert f"at 128 tokens: {audit}\n" in done.stdout


def test_what_is_wrong_with_a_raw_file(tmp_path):
    items = [
        conversation("a", "Where does the sun go?", "Below the horizon."),
        conversation("b", "Where does the sun  go?", "Below the horizon."),
        conversation("c", "Where does the sun go?", "Below the horizon.", "Why?", "It turns."),
        conversation("c", "Was ist das?", "Das ist ein deutscher Satz über das Wetter von heute."),
        {"id": 7, "messages": [{"role": "user", "content": "x"}]},
        {"instruction": "Say it.", "output": "It."},
        {"id": "wrong", "conversations": None},
        conversation("odd", "x", "y", "z", "w", label_from=9),
        42,
    ]
    done = inspect("--in", save(tmp_path / "raw.json", items))
    found = rows(done.stdout)
    assert found["conversations"] == "7 with 8 pairs"
    assert found["formats"] == "ShareGPT 5, Alpaca 1, OpenAI messages 1"
    assert found["roles"] == "human 9, gpt 8"
    assert "de 1" in found["languages"]
    assert found["duplicates"] == "beginning of a longer one 2, equal ids 1"
    assert found["unreadable"] == "no list of turns 1, not an object 1"
    assert found["not trainable"] == (
        "label_from is outside the answer 1, no question with an answer 1"
    )
    assert found["repaired as read"] == "integer ids 1, missing ids 1, role names 1"


def test_several_processes_find_what_one_does(tmp_path):
    texts = [turn["value"] for one in shipped("dummy_en.json") for turn in one["conversations"]]
    choose = random.Random(0)
    items = [
        conversation(f"{n}", choose.choice(texts), " ".join(choose.choices(texts, k=40)))
        for n in range(2600)
    ]
    path = save(tmp_path / "big.json", items)
    assert path.stat().st_size > 4 << 20
    page = tmp_path / "page.html"
    found = []
    for workers in ("1", "2"):
        flags = "--workers", workers, "--html", page, "--sample", len(items)
        found.append((run_script(INSPECT, "--in", path, *flags).stdout, page.read_text()))
    assert found[0] == found[1]
    assert rows(found[0][0])["conversations"] == "2,600 with 2,600 pairs"


def test_damage_at_the_end_of_a_large_file_is_told(tmp_path):
    """It has many chunks, so the damage is found long after the first was added up."""
    items = [conversation(f"{n}", f"Question {n}?", "Yes. " * 300) for n in range(1200)]
    path, page = tmp_path / "cut.json", tmp_path / "page.html"
    path.write_text(json.dumps(items)[:-900])
    assert path.stat().st_size > 4 * stage.CHUNK_BYTES
    flags = "--salvage", "--html", page, "--sample", 1
    done = inspect("--in", path, *flags)
    assert rows(done.stdout)["conversations"] == "1,199 with 1,199 pairs"
    assert "conversation 1199 (byte " in done.stderr
    assert "conversation 1199 (byte " in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--in", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["--show", "nobody"], "no conversation has the number or id 'nobody'"),
        (["--show", "2"], "no conversation has the number or id '2'"),
        (["--model-name", "nowhere"], "nowhere: no such folder, expected a model folder"),
        (["--html", "nowhere/page.html"], "nowhere/page.html: No such file or directory"),
    ],
)
def test_errors_are_lines(piece, flags, message):
    done = inspect("--in", piece, *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_empty_file_has_a_report(tmp_path):
    path, page = save(tmp_path / "none.json", []), tmp_path / "page.html"
    done = inspect("--in", path, "--html", page)
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout)["conversations"] == "0 with 0 pairs"
    assert "All 0." in page.read_text(encoding="utf-8")


def test_no_output_replaces_an_input(piece):
    before = piece.read_bytes()
    for script, *flags in (
        (INSPECT, "--html", piece),
        (
            CLEAN,
            "--out",
            piece.with_name("out.json"),
            "--rejected",
            piece.parent / "." / piece.name,
        ),
    ):
        done = run_here(script, "--in", piece, *flags)
        assert done.returncode == 1
        assert f"{piece}: {flags[-2]} would replace this input" in done.stderr
        assert piece.read_bytes() == before
