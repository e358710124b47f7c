"""What is looked at: a corpus that went through the stages, and a small file."""

from contextlib import chdir

import pytest

from tests.conftest import run_here, shipped
from tests.corpora import conversation, save
from tests.report.inspected import HOSTILE, WINDOW, inspect


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, llama_tokenizer):
    """A folder with a tokenizer, which is all of a base model that is looked at."""
    folder = tmp_path_factory.mktemp("tokenizer")
    llama_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chain(tmp_path_factory, tokenizer_folder):
    """The folder in which the stages ran on shipped data, hostile data among it, and `report.html`.

    They ran inside of it, which is not where we are.
    """
    folder = tmp_path_factory.mktemp("chain")
    items = [*shipped("dummy_en.json")[:60], *shipped("sharegpt_sample.json")[:60]]
    items += [conversation(HOSTILE, f"Show {HOSTILE}, please.", f"This is {HOSTILE} as text.")]
    items += [conversation("blocked", "Who are you?", f"I am ChatGPT, {HOSTILE}")]
    items += [{"id": "none", "conversations": HOSTILE}]
    long = " ".join(f"This is sentence {n} of a long answer." for n in range(120))
    items += [conversation("long", "Say a lot, please.", long)]
    save(folder / "raw.json", items)
    stages = {
        "merge": ["--rejected", "merge.rejected.jsonl"],
        "clean_sharegpt": ["--rejected", "clean.rejected.jsonl"],
        "optional_clean": ["--keep-lang", "en", "--rejected", "language.rejected.json"],
        "split_long_conversation": ["--model-name", tokenizer_folder, "--max-length", WINDOW],
    }
    source = "raw.json"
    with chdir(folder):
        for name, flags in stages.items():
            script, out = f"fastchat/data/{name}.py", f"{name}.json"
            done = run_here(script, "--in", source, "--out", out, "--workers", 1, *flags)
            assert done.returncode == 0, done.stderr
            source = out
    done = inspect(
        *("--in", folder / source, "--model-name", tokenizer_folder, "--max-length", WINDOW),
        *("--html", folder / "report.html"),
    )
    assert done.returncode == 0, done.stderr
    (folder / "report.txt").write_text(done.stdout, encoding="utf-8")
    return folder


@pytest.fixture
def piece(tmp_path):
    """A file with a piece of an answer, which is context up to its tenth character."""
    item = conversation("a\33[2Jb", "Tell me.", "It began and it went on.", label_from=9)
    return save(tmp_path / "pieces.json", [conversation("0", "Hello?", "Hi."), item])
