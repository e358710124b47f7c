"""From a corpus file to examples: the tokens on disk, the audit, and what is refused."""

import json
import re
import shlex
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from llama_lora.cli import InputError
from llama_lora.model.labels import IGNORE
from llama_lora.model.template import Template, load_tokenizer
from llama_lora.report.training_example import HEAD, TAIL, shown
from llama_lora.train.data.examples import Audit, hold_out, load_examples
from llama_lora.train.data.token_cache import Entry
from tests.conftest import ROOT, error_line, run_here, shipped

WINDOW = 128  # tokens; the shipped data has longer conversations


@pytest.fixture(scope="module")
def template(llama_tokenizer) -> Template:
    return Template(llama_tokenizer)


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "split.json"
    path.write_text(json.dumps(shipped("dummy_en.json")[:60]))
    return path


@pytest.fixture
def load(corpus, template, tmp_path):
    """`load_examples` of `corpus`, by default with all else that it needs."""

    def load(path=corpus, template=template, max_length=WINDOW, allow_truncation=True):
        return load_examples(path, template, max_length, tmp_path / "tokens", allow_truncation)

    load.folder = tmp_path / "tokens"
    return load


@pytest.fixture
def overlong(corpus) -> Path:
    """`corpus` with an answer of several windows."""
    items = [{"id": "a", "conversations": turns("Why?", "Since this is so. " * 100)}]
    corpus.write_text(json.dumps(items))
    return corpus


def written(folder: Path) -> dict[str, int]:
    """The files in `folder`, each with a number that changes when it is written anew."""
    return {path.name: path.stat().st_ino for path in folder.iterdir()} if folder.exists() else {}


def test_examples_are_what_the_template_encodes(load, template, corpus):
    examples, audit = load()
    encoded = template.encode_batch(json.loads(corpus.read_text()))
    assert len(examples) == len(encoded) == audit.conversations
    for example, length, expected in zip(examples, examples.lengths, encoded, strict=True):
        assert (example.ids.dtype, example.labels.dtype) == (np.int32, np.int32)
        assert example.ids.tolist() == expected.ids[:WINDOW]
        assert example.labels.tolist() == expected.labels[:WINDOW]
        assert length == len(example.ids)


def test_the_audit_counts_every_token(load, template, corpus):
    ids = [encoded.ids for encoded in template.encode_batch(json.loads(corpus.read_text()))]
    labels = [e.labels for e in template.encode_batch(json.loads(corpus.read_text()))]
    examples, audit = load()
    assert audit == Audit(
        conversations=60,
        tokens=sum(min(len(one), WINDOW) for one in ids),
        labelled=sum(label != IGNORE for one in labels for label in one[:WINDOW]),
        truncated=sum(len(one) > WINDOW for one in ids),
        cut=sum(label != IGNORE for one in labels for label in one[WINDOW:]),
        unlabelled=0,
    )
    assert audit.truncated
    assert audit.cut


def test_an_example_without_a_label_in_the_window_is_left_out_and_counted(load, corpus):
    items = shipped("dummy_en.json")[:3]
    items[1]["conversations"][0]["value"] = "word " * WINDOW
    corpus.write_text(json.dumps(items))
    examples, audit = load()
    assert [example.id for example in examples] == [items[0]["id"], items[2]["id"]]
    assert (audit.conversations, audit.unlabelled) == (2, 1)


def test_special_tokens_that_a_text_spells_are_counted(load, corpus):
    """The tokenizer reads them as what they are: an answer would end where it says </s>."""
    items = shipped("dummy_en.json")[:4]
    _, audit = load()
    assert audit.special == 0
    assert "special" not in str(audit)
    items[0]["conversations"][1]["value"] += " In HTML, </s> ends <s>."
    items[2]["conversations"][0]["value"] += " </S> <s > <unk>"
    corpus.write_text(json.dumps(items))
    _, audit = load()
    assert audit.special == 2
    assert "2 with a special token spelled out in the text" in str(audit)


def test_a_restart_reads_what_is_there(load):
    examples, audit = load()
    before = written(load.folder)
    again, same_audit = load()
    assert written(load.folder) == before
    assert str(same_audit) == str(audit)
    assert [one.labels.tolist() for one in again] == [one.labels.tolist() for one in examples]


def test_whatever_changes_the_tokens_makes_new_ones(load, corpus, llama_tokenizer, byte_tokenizer):
    load()
    count = len(written(load.folder))
    renamed = Template(deepcopy(llama_tokenizer))
    renamed.tokenizer.eos_token = "<unk>"
    changes = [
        {"max_length": WINDOW + 1},
        {"template": Template(byte_tokenizer)},
        {"template": Template(byte_tokenizer, "model")},
        {"template": renamed},
    ]
    for number, change in enumerate(changes, 2):
        load(**change)
        assert len(written(load.folder)) == number * count, change
    items = json.loads(corpus.read_text())
    items[0]["conversations"][1]["value"] += "!"
    corpus.write_text(json.dumps(items))
    load()
    assert len(written(load.folder)) == (len(changes) + 2) * count


KILLED = """
import os, sys
from pathlib import Path
from llama_lora.train.data.token_cache import Entry

def batches():
    yield {"id": ["a"], "source": ["a"], "ids": [[1, 2]], "labelled": [[False, True]]}
    os.kill(os.getpid(), 9)

Entry(Path(sys.argv[1]), "key").write(batches(), {})
"""


def test_what_a_killed_run_wrote_is_never_read(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT)
    entry = Entry(tmp_path, "key")
    assert done.returncode == -9
    assert not entry.exists()
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, sys
from pathlib import Path
from llama_lora.cli import one_line_errors
from llama_lora.train.data.token_cache import Entry

row = {"id": ["a"], "source": ["a"], "ids": [[1] * 1000], "labelled": [[True] * 1000]}
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
one_line_errors(Entry(Path(sys.argv[1]), "key").write)([row] * 1000, {})
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "key.arrow: File too large; nothing was changed" in done.stderr
    assert not list(tmp_path.iterdir())


def test_tokens_without_their_account_are_not_read(tmp_path):
    """A run was killed after the first of the two files was put in its place."""
    entry = Entry(tmp_path, "key")
    rows = {"id": ["a"], "source": ["a"], "ids": [[1, 2]], "labelled": [[False, True]]}
    entry.write([rows], {})
    assert entry.exists()
    entry.account.unlink()
    assert not entry.exists()


def test_a_fault_in_the_corpus_leaves_nothing(load, corpus):
    corpus.write_text(json.dumps([*shipped("dummy_en.json")[:3], {"conversations": 1}]))
    with pytest.raises(InputError, match=r"conversation 3 .*clean the file"):
        load()
    assert not written(load.folder)


def test_a_folder_that_cannot_be_is_one_line(corpus, template, tmp_path):
    with pytest.raises(InputError, match=r"Not a directory; --token_cache DIR"):
        load_examples(corpus, template, WINDOW, corpus / "tokens")
    with pytest.raises(InputError, match="absent.json: No such file"):
        load_examples(tmp_path / "absent.json", template, WINDOW, tmp_path)


def test_pieces_of_one_conversation_stay_on_one_side(load, corpus):
    items = shipped("dummy_en.json")[:20]
    pieces = [
        {**item, "id": f"{item['id']}_{k}", "piece_of": item["id"]}
        for item in items
        for k in (0, 1, 2)
    ]
    corpus.write_text(json.dumps(pieces))
    examples, _ = load()
    kept, held = hold_out(examples, 0.2, seed=0)
    assert len(held) == 4 * 3
    assert not set(kept.sources) & set(held.sources)
    ids = [example.id for example in (*kept, *held)]
    assert sorted(ids) == sorted(piece["id"] for piece in pieces)
    for side in (kept, held):
        assert [len(example.ids) for example in side] == side.lengths.tolist()
        assert [example.source for example in side] == side.sources


def test_a_corpus_that_the_window_cuts_is_refused(load, overlong, tiny_base):
    template = Template(load_tokenizer(tiny_base))
    _, audit = load(template=template)
    assert audit.cut_share > 0.05
    with pytest.raises(InputError) as refusal:
        load(template=template, allow_truncation=False)
    share = f"{audit.cut / (audit.cut + audit.labelled):.1%}"
    assert share in str(refusal.value)
    assert "at most 5%" in str(refusal.value)
    assert "--allow_truncation True" in str(refusal.value)

    command = re.search("python3 (.*), or lose", str(refusal.value))[1]
    done = run_here(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    split = overlong.with_name("split_split.json")
    _, audit = load(split, template, allow_truncation=False)
    assert (audit.truncated, audit.cut) == (0, 0)


def test_the_command_names_the_models_own_template(load, overlong, byte_tokenizer):
    with pytest.raises(InputError, match="--template model, or lose"):
        load(template=Template(byte_tokenizer, "model"), allow_truncation=False)


def test_a_few_cut_tokens_are_not_refused(load, corpus, template):
    items = [
        {"id": str(n), "conversations": turns(f"Question {n}", "yes " * 20)} for n in range(100)
    ]
    items[7]["conversations"][1]["value"] = "yes " * 100
    corpus.write_text(json.dumps(items))
    _, audit = load(allow_truncation=False)
    assert 0 < audit.cut_share <= 0.05


def test_no_token_to_learn_is_refused(load, corpus):
    corpus.write_text(json.dumps([{"id": "a", "conversations": turns("why " * WINDOW, "So.")}]))
    with pytest.raises(InputError, match="no token to learn: .* none in 1 conversations"):
        load()
    assert not written(load.folder)


def test_the_trainer_refuses_before_it_loads_the_model(overlong, tiny_base, tmp_path):
    script = ROOT / "fastchat/train/train_lora.py"
    flags = ["--model_name_or_path", tiny_base, "--data_path", overlong]
    flags += ["--output_dir", tmp_path / "out", "--model_max_length", WINDOW]
    done = run_here(script, *flags, "--token_cache", tmp_path / "tokens")
    assert "of the answer tokens" in error_line(done)
    assert "parameters" not in done.stdout
    assert written(tmp_path / "tokens")


def test_an_example_is_shown_with_what_is_learned(load, template, corpus):
    item = {"id": "one", "conversations": turns("Why?", "So.", "Really?", "Yes,\nreally.")}
    corpus.write_text(json.dumps([item]))
    examples, _ = load(max_length=400)
    text = shown(examples[0], template, colour=False)
    assert text.count("⟦") == 3  # one explains itself
    assert "ASSISTANT:⟦ So.</s>⟧" in text
    assert text.endswith("⟦ Yes,\nreally.</s>⟧")
    coloured = shown(examples[0], template, colour=True)
    assert coloured.count("\33[32m") == 3
    assert re.sub("\33\\[[0-9]+m", "", coloured) == re.sub("[⟦⟧]", "", text)


def test_a_long_example_is_shortened_in_its_middle(load, template, corpus):
    answer = "\n".join(f"line {n}" for n in range(200))
    corpus.write_text(json.dumps([{"id": "one", "conversations": turns("Count.", answer)}]))
    examples, _ = load(max_length=4000)
    lines = shown(examples[0], template, colour=False).splitlines()
    assert len(lines) <= HEAD + TAIL + 2
    assert lines[1].startswith("<s> A chat between")
    assert any(re.fullmatch(r"… [\d,]+ characters …", line) for line in lines)
    assert lines[-1] == "line 199</s>⟧"


def turns(*texts: str) -> list[dict]:
    """A question, its answer, and so on."""
    return [
        {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)
    ]
