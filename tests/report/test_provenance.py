"""How a corpus came about: the accounts of its stages are found, wherever they ran."""

import os
from itertools import pairwise

import pytest

from llama_lora.cli import InputError
from llama_lora.report import provenance
from tests.conftest import run_here
from tests.corpora import conversation, save
from tests.corpus.stages import CLEAN, MERGE


def test_the_chain_is_found_and_told(chain):
    """From another folder than the stages ran in, and with the books of each as it left them."""
    stages = ["merge", "clean_sharegpt", "optional_clean", "split_long_conversation"]
    steps = provenance.steps(str(chain / "split_long_conversation.json"))
    assert [step.name for step in steps] == stages
    for before, after in pairwise(steps):
        assert before.account["written"] == after.account["read"]
    merge, clean, language, _ = steps
    assert merge.reasons() == [("no list of turns", 1)]
    (example,) = merge.examples["no list of turns"]
    assert (example.id, "</script><img src=x" in example.excerpt) == ("none", True)
    assert "blocked phrase" in dict(clean.reasons())
    (blocked, *_) = [one for one in clean.examples["blocked phrase"] if one.id == "blocked"]
    assert "I am ChatGPT" in blocked.excerpt
    assert set(language.examples) == set(dict(language.reasons()))
    assert all(1 <= len(found) <= provenance.EXAMPLES for found in language.examples.values())


def test_a_stage_that_wrote_over_its_input_is_told_once(tmp_path):
    path = save(tmp_path / "a.json", [conversation("a", "b", "c")])
    run_here(MERGE, "--in", path, "--out", path)
    assert [step.name for step in provenance.steps(str(path))] == ["merge"]


def test_a_chain_over_several_folders_is_found_from_any(tmp_path, monkeypatch):
    """In each folder there is a `merged.json`, and an account beside it."""
    for name in ("raw", "deep/made", "other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "made").symlink_to(tmp_path / "deep" / "made")
    raw = save(tmp_path / "raw" / "raw.json", [conversation("a", "b", "c")])
    first, other = tmp_path / "raw" / "merged.json", tmp_path / "other" / "merged.json"
    run_here(MERGE, "--in", raw, "--out", first)
    run_here(MERGE, "--in", raw, "--out", other, "--limit", "1")
    made = tmp_path / "made" / "merged.json"
    run_here(CLEAN, "--in", first, "--out", made, "--rejected", tmp_path / "raw" / "no.json")
    monkeypatch.chdir(tmp_path / "other")
    for path in (os.path.relpath(made), str(tmp_path / "deep" / "made" / "merged.json")):
        steps = provenance.steps(path)
        assert [step.name for step in steps] == ["merge", "clean_sharegpt"]
        assert steps[0].account["options"]["limit"] is None


def test_the_held_out_share_has_its_account(tmp_path):
    items = [conversation(f"{n}", f"Question {n}?", f"Answer {n}.") for n in range(40)]
    path, out = save(tmp_path / "raw.json", items), tmp_path / "out.json"
    run_here(MERGE, "--in", path, "--out", out, "--split-eval", 0.5)
    (step,) = provenance.steps(str(tmp_path / "out.eval.json"))
    assert (step.account["read"], step.account["seen"]) == (40, {"held out": 20})


@pytest.mark.parametrize("account", ["{", "[]", '{"stage": "merge.py", "inputs": [3]}', "null"])
def test_a_broken_account_is_bad_input(piece, account):
    piece.with_name("pieces.json.account").write_text(account)
    with pytest.raises(InputError, match="pieces.json.account: expected the account of a stage"):
        provenance.steps(str(piece))
