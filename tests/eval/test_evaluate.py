"""evaluate.py as users run it: what it measures and writes, and what it refuses."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from llama_lora.chat.adapters import BASE
from llama_lora.eval import charts
from llama_lora.model.template import Template, load_tokenizer
from llama_lora.train.data.examples import hold_out, load_examples
from tests.conftest import DATA, ROOT, error_line, run_here
from tests.corpora import conversation, save
from tests.eval.evaluation import SIDES, adapted, evaluate


def test_base_against_adapter(tmp_path, tiny_base, tiny_adapter, corpus):
    done = evaluate(
        *("--base_model", tiny_base, "--lora_weights", tiny_adapter, "--data_path", corpus),
        *("--questions", DATA / "questions.jsonl", "--limit", 9, "--max_new_tokens", 12),
        *("--output_dir", tmp_path / "made", "--max_length", 256),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "made" / "evaluation.json").read_text(encoding="utf-8"))
    held_out, answers = found["held_out"], found["answers"]

    assert held_out["file"]["conversations"] == 15  # as pieces
    assert len(held_out["conversations"]) == 9
    weights = np.array([one["labelled_tokens"] for one in held_out["conversations"]])
    assert held_out["labelled_tokens"] == weights.sum()
    for side in SIDES:
        losses = np.array([one["loss"][side] for one in held_out["conversations"]])
        estimate = held_out["loss"][side]
        assert estimate["value"] == pytest.approx((losses * weights).sum() / weights.sum())
        assert estimate["low"] < estimate["value"] < estimate["high"]
        assert held_out["perplexity"][side]["value"] == pytest.approx(np.exp(estimate["value"]))
    change = held_out["loss"]["adapter"]["value"] - held_out["loss"][BASE]["value"]
    assert held_out["change"]["value"] == pytest.approx(change)
    assert held_out["better"] + held_out["worse"] == 9
    assert held_out["trained_on"] is None  # this adapter does not say

    assert len(answers["asked"]) == 9
    turns = [turn for one in answers["asked"] for turn in one["turns"]]
    assert answers["rates"][BASE]["answers"] == len(turns)
    assert all(turn[side]["tokens"] <= 12 for turn in turns for side in SIDES)
    assert any(turn[BASE]["text"] != turn["adapter"]["text"] for turn in turns)
    stopped = sum(turn[BASE]["stopped"] for turn in turns) / len(turns)
    assert answers["rates"][BASE]["stopped"] == pytest.approx(stopped)

    lines = done.stdout.splitlines()
    assert lines[0].startswith("loss per labelled token over 9 held-out conversations")
    told = charts.signed(held_out["change"]["value"])
    assert f"change    {told}" in done.stdout
    assert lines[-2:] == [
        str(tmp_path / "made" / f"evaluation.{kind}") for kind in ("html", "json")
    ]


def test_the_base_alone(tmp_path, tiny_base, corpus):
    done = evaluate(
        *("--base_model", tiny_base, "--data_path", corpus, "--output_dir", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(found["held_out"]["loss"]) == [BASE]
    assert "change" not in found["held_out"]
    assert "answers" not in found


def test_the_share_that_training_held_out(tmp_path, tiny_base, tiny_adapter, corpus):
    flags = "--base_model", tiny_base, "--lora_weights", tiny_adapter, "--data_path", corpus
    done = evaluate(
        *flags,
        *("--eval_ratio", 0.25, "--seed", 7, "--max_length", 256, "--output_dir", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    examples, _ = load_examples(str(corpus), Template(load_tokenizer(tiny_base)), 256)
    _, held_out = hold_out(examples, 0.25, 7)
    found = json.loads((tmp_path / "evaluation.json").read_text())["held_out"]["conversations"]
    assert [one["id"] for one in found] == list(dict.fromkeys(held_out.sources))


def test_the_losses_are_those_that_training_measured(tmp_path, tiny_base, corpus):
    done = run_here(
        "fastchat/train/train_lora.py",
        *("--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", tmp_path),
        *("--model_max_length", 256, "--eval_ratio", 0.25, "--quantization", "none"),
        *("--max_steps", 3, "--learning_rate", 0.01, "--token_cache", tmp_path / "tokens"),
    )
    assert done.returncode == 0, done.stderr
    trained = json.loads((tmp_path / "summary.json").read_text())
    done = evaluate(
        *("--base_model", tiny_base, "--lora_weights", tmp_path, "--data_path", corpus),
        *("--max_length", 256, "--eval_ratio", 0.25),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "evaluation.json").read_text())["held_out"]
    for side, when in ((BASE, "before"), ("adapter", "after")):
        measured = trained[f"held_out_loss_{when}"]
        assert found["loss"][side]["value"] == pytest.approx(measured, rel=1e-3)
    assert trained["held_out_loss_after"] < trained["held_out_loss_before"] - 0.01
    assert found["trained_on"] == []


def test_what_was_trained_on_is_told(tmp_path, tiny_base, corpus):
    folder = adapted(tiny_base, tmp_path / "adapter")
    flags = {"data_path": str(corpus), "model_max_length": 256, "eval_ratio": 0.25, "seed": 42}
    (folder / "summary.json").write_text(json.dumps({"settings": flags}))
    flags = "--base_model", tiny_base, "--lora_weights", folder, "--data_path", corpus
    done = evaluate(*flags, "--max_length", 256)
    seen = json.loads((folder / "evaluation.json").read_text())["held_out"]["trained_on"]
    assert 8 <= len(seen) < 14
    assert f"warning: {len(seen)} of 14 conversations hold a question" in done.stderr
    assert "Seen in training" in (folder / "evaluation.html").read_text()
    done = evaluate(*flags, "--max_length", 256, "--eval_ratio", 0.25)
    assert "warning" not in done.stderr
    assert "Seen in training" not in (folder / "evaluation.html").read_text()


def test_a_killed_run_goes_on(tmp_path, tiny_base, tiny_adapter, corpus):
    own = ["--base_model", tiny_base, "--lora_weights", tiny_adapter, "--data_path", corpus]
    own += ["--questions", DATA / "questions.jsonl", "--max_length", 256, "--limit", 14]

    def flags(folder, tokens=12):
        return [*own, "--max_new_tokens", tokens, "--output_dir", tmp_path / folder]

    def found(folder):
        return json.loads((tmp_path / folder / "evaluation.json").read_text(encoding="utf-8"))

    partial = tmp_path / "out" / "evaluation.json.partial"
    command = [sys.executable, ROOT / "fastchat/eval/evaluate.py", *flags("out")]
    run = subprocess.Popen([str(word) for word in command], cwd=ROOT)
    while not (partial.exists() and partial.read_bytes().count(b"answer of base") > 2):
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.wait()
    kept = partial.read_bytes()
    assert not (tmp_path / "out" / "evaluation.json").exists()
    for folder in ("out", "whole"):
        done = evaluate(*flags(folder))
        assert done.returncode == 0, done.stderr
    assert found("out") == found("whole")
    assert not partial.exists()

    partial.write_bytes(kept.replace(b'"text":"', b'"text":"Kept. ')[:-9])
    refused = error_line(evaluate(*flags("out", tokens=5)))
    assert "measurements of a run that differs in max_new_tokens; remove it" in refused
    assert evaluate(*flags("out")).returncode == 0
    texts = [
        turn[BASE]["text"] for one in found("out")["answers"]["asked"] for turn in one["turns"]
    ]
    assert any(text.startswith("Kept. ") for text in texts)  # and so was not asked again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--base_model": "nowhere"}, "nowhere: not a model folder"),
        ({"--lora_weights": "{base}"}, "not an adapter folder"),
        ({"--base_model": "{other}"}, "this adapter was not made for the base"),
        ({"--data_path": "nowhere.json"}, "nowhere.json: No such file or directory"),
        ({"--data_path": "{unanswered}"}, "no token to learn"),
        ({"--questions": "nowhere.jsonl"}, "nowhere.jsonl: No such file or directory"),
        ({"--questions": "{corpus}"}, "expected the last turn to be a question"),
        ({"--output_dir": "{corpus}"}, "cannot write there"),
        ({"--eval_ratio": "0.5", "--data_path": "{single}"}, "no conversation is left"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line(
    tmp_path, tiny_base, tiny_adapter, corpus, other_base, change, message
):
    single = conversation("a", "Why?", "No reason.")
    long = conversation("b", "Why? " * 300, "Because.")
    places = {
        "base": tiny_base,
        "other": other_base,
        "corpus": corpus,
        "single": save(tmp_path / "single.json", [single]),
        "unanswered": save(tmp_path / "unanswered.json", [long]),
    }
    out = tmp_path / "out"
    out.mkdir()
    for name in ("evaluation.html", "evaluation.json"):
        (out / name).write_text("old")
    flags = {
        "--base_model": tiny_base,
        "--lora_weights": tiny_adapter,
        "--data_path": corpus,
        "--output_dir": out,
        "--max_length": 256,
    }
    flags |= {name: value.format(**places) for name, value in change.items()}
    done = evaluate(*(word for pair in flags.items() for word in pair))
    assert message in error_line(done)
    assert {path.read_text() for path in out.iterdir()} == {"old"}


@pytest.fixture(scope="module")
def other_base(tmp_path_factory, llama_tokenizer) -> Path:
    """A base of another shape."""
    folder = tmp_path_factory.mktemp("other-base")
    small = LlamaConfig(
        vocab_size=len(llama_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(small).save_pretrained(folder)
    llama_tokenizer.save_pretrained(folder)
    return folder


def test_nothing_to_measure_is_a_usage_error(tiny_base):
    done = evaluate("--base_model", tiny_base)
    assert done.returncode == 2
    assert "nothing to measure" in done.stderr
