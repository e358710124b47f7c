"""Evaluation: losses are those of plain forward passes, and what is said of answers is true."""

import json
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from browser import needs_chromium, opened
from conftest import DATA, ROOT, shipped
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llama_lora.chat.adapters import BASE, load_adapters
from llama_lora.corpus.language import language_of
from llama_lora.eval import bootstrap, charts, overlap, questions
from llama_lora.eval.losses import labelled_counts, summed_losses, token_changes
from llama_lora.eval.page import kind_of, texts, verdict
from llama_lora.eval.rates import loops, repetition
from llama_lora.model import adapter
from llama_lora.model.template import IGNORE, Template, load_tokenizer
from llama_lora.train.examples import hold_out, load_examples

SCRIPT = ROOT / "fastchat/eval/evaluate.py"
HOSTILE = "</p><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
SIDES = [BASE, "adapter"]


def said(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def save(path: Path, items: list) -> Path:
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def save_lines(path: Path, items: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def adapted(base: Path, folder: Path, seed: int = 1) -> Path:
    """An adapter on `base` that changes what it says, in `folder`."""
    torch.manual_seed(seed)
    model = adapter.attach(AutoModelForCausalLM.from_pretrained(base), 4, 8, 0.0, ["all-linear"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    adapter.save(model, Template(load_tokenizer(base)), folder)
    return folder


@pytest.fixture(scope="module")
def tiny_adapter(tiny_base, tmp_path_factory) -> Path:
    return adapted(tiny_base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Conversations of several turns and lengths, one of them in two pieces."""
    items = shipped("dummy_en.json")[:12]
    items += [
        {"id": "long", "conversations": said("Tell me more.", "Gladly. " * 30, "And?", "No.")},
        {"id": "p_0", "piece_of": "p", "conversations": said("One?", "It is one of two.")},
        {"id": "p_1", "piece_of": "p", "conversations": said("Two?", "It is the other, then.")},
    ]
    return save(tmp_path_factory.mktemp("corpus") / "heldout.json", items)


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Run evaluate.py's own `main` in this process, which spares each run the imports."""
    script = runpy.run_path(str(SCRIPT))

    def run(*flags) -> CompletedProcess:
        words = [str(SCRIPT), *(str(flag) for flag in flags)]
        monkeypatch.setattr(sys, "argv", words)
        capsys.readouterr()
        code = 0
        try:
            script["main"](script["parse_args"]())
        except SystemExit as end:
            code = end.code
        return CompletedProcess(words, code, *capsys.readouterr())

    return run


# ---- Losses ----


def plain_losses(model, examples) -> list[float]:
    """Summed cross-entropy of each example, by itself, from the logits of the model."""
    found = []
    with torch.no_grad():
        for i in range(len(examples)):
            ids, labels = (
                torch.tensor(part.astype(np.int64))
                for part in (examples[i].ids, examples[i].labels)
            )
            logits = model(ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            found.append(loss.item())
    return found


def test_losses_are_those_of_plain_forward_passes(tiny_base, tiny_adapter, corpus):
    adapters, _ = load_adapters(tiny_base, {"adapter": tiny_adapter})
    examples, _ = load_examples(str(corpus), adapters.templates["adapter"], 256)
    sums = summed_losses(adapters, SIDES, examples, 256)
    alone = AutoModelForCausalLM.from_pretrained(tiny_base)
    expected = {BASE: plain_losses(alone, examples)}
    expected["adapter"] = plain_losses(PeftModel.from_pretrained(alone, tiny_adapter), examples)
    for side in SIDES:
        np.testing.assert_allclose(sums[side], expected[side], rtol=1e-5)
    assert np.abs(sums[BASE] - sums["adapter"]).min() > 1e-3


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantized_base_is_measured_with_its_adapter(
    tiny_base, tiny_adapter, corpus, quantization
):
    def measured(quantization):
        adapters, _ = load_adapters(tiny_base, {"adapter": tiny_adapter}, quantization)
        examples, _ = load_examples(str(corpus), adapters.templates["adapter"], 256)
        return summed_losses(adapters, SIDES, examples, 256)

    found, whole = measured(quantization), measured("none")
    for side in SIDES:
        np.testing.assert_allclose(found[side], whole[side], rtol=0.05)
    changes = [sums["adapter"] - sums[BASE] for sums in (found, whole)]
    assert np.corrcoef(*changes)[0, 1] > 0.9


def test_measuring_leaves_the_model_as_it_was(tiny_base, tiny_adapter, corpus):
    adapters, _ = load_adapters(tiny_base, {"adapter": tiny_adapter})
    model = adapters.model.get_base_model()
    before, attributes = model(torch.arange(9)[None]).logits, set(vars(model))
    examples, _ = load_examples(str(corpus), adapters.templates["adapter"], 256)
    summed_losses(adapters, SIDES, examples, 256)
    assert set(vars(model)) == attributes
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(torch.arange(9)[None]).logits, before)


def test_changes_token_by_token_add_up(tiny_base, tiny_adapter, corpus):
    adapters, _ = load_adapters(tiny_base, {"adapter": tiny_adapter})
    examples, _ = load_examples(str(corpus), adapters.templates["adapter"], 256)
    sums = summed_losses(adapters, SIDES, examples, 256)
    chosen = [examples[i] for i in range(len(examples))]
    changes = token_changes(adapters, *SIDES, chosen)
    found = [
        change[1:][example.labels[1:] != IGNORE].sum()
        for change, example in zip(changes, chosen, strict=True)
    ]
    np.testing.assert_allclose(found, sums["adapter"] - sums[BASE], rtol=1e-3, atol=1e-3)


def test_what_the_loss_is_divided_by(tiny_base, corpus):
    examples, audit = load_examples(str(corpus), Template(load_tokenizer(tiny_base)), 256)
    assert labelled_counts(examples).sum() == audit.labelled


# ---- Intervals ----


def test_an_interval_is_that_of_the_ratio_and_repeats():
    """For many conversations, close to what the delta method says of a ratio of sums."""
    random = np.random.default_rng(0)
    weights = random.integers(5, 200, 400).astype(float)
    sums = np.stack([weights * random.normal(2, 0.5, 400), weights * random.normal(0.1, 1, 400)], 1)
    first, second = bootstrap.ratios(sums, weights, seed=3)
    assert [first, second] == bootstrap.ratios(sums, weights, seed=3)
    for column, found in enumerate((first, second)):
        value = sums[:, column].sum() / weights.sum()
        residuals = sums[:, column] - value * weights
        margin = 1.96 * np.sqrt((residuals**2).sum()) / weights.sum()
        assert found.value == pytest.approx(value)
        assert found.low == pytest.approx(value - margin, abs=margin * 0.1)
        assert found.high == pytest.approx(value + margin, abs=margin * 0.1)


def test_the_difference_is_paired():
    """What both sides have in common does not widen the interval of their difference."""
    random = np.random.default_rng(0)
    weights = np.full(50, 10.0)
    base = random.normal(30, 10, 50)
    tuned = base - 1 + random.normal(0, 0.1, 50)
    sums = np.stack([base, tuned, tuned - base], 1)
    *sides, change = bootstrap.ratios(sums, weights, seed=0)
    assert change.high - change.low < (sides[0].high - sides[0].low) / 20
    assert change.high < 0


def test_one_conversation_has_no_interval():
    (found,) = bootstrap.ratios(np.array([[6.0]]), np.array([4.0]), seed=0)
    assert found == bootstrap.Estimate(1.5, None, None)


# ---- Rates ----


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([1, 2, 3], None),
        ([1, 2, 3, 4], 0),
        (list(range(50)), 0),
        ([7] * 13, 0.9),  # ten runs, all the same
        ([1, 2, 3, 4, 1, 2, 3, 4], 0.2),  # five runs, the last is the first
    ],
)
def test_repetition(ids, share):
    assert repetition(ids) == (share if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("ids", "is_loop"),
    [
        ([5] * 24, True),
        ([5] * 23, False),  # laughter may be that long
        ([*range(100), *[1, 2, 3] * 8], True),
        ([*range(100), *list(range(60)) * 3], True),
        ([*range(100), *list(range(60)) * 2], False),  # said twice
        ([*[1, 2, 3] * 20, 9], False),  # it found its way out
        (list(range(300)), False),
        ([], False),
    ],
)
def test_loops(ids, is_loop):
    assert loops(ids) is is_loop


# ---- Questions ----


def test_the_shipped_questions():
    """Forty, evenly spread, each in the language that it says and that our detector finds."""
    found = questions.read(DATA / "questions.jsonl", None, 0)
    assert len({question.id for question in found}) == 40
    by_category = {}
    for question in found:
        by_category.setdefault(question.category, []).append(question.language)
        turns = [{"from": "human", "value": turn} for turn in question.turns]
        assert language_of(turns).partition("-")[0] == question.language, question.turns
    assert len(by_category) == 8
    assert all(sorted(found) == ["en", "en", "en", "es", "zh"] for found in by_category.values())


def test_both_forms_of_a_question(tmp_path):
    path = save_lines(
        tmp_path / "q.jsonl",
        [
            {"question_id": 1, "text": "¿Dónde está la biblioteca del pueblo?", "category": "old"},
            {"question_id": "b", "turns": ["First?", "Second?"], "reference": ["kept out"]},
        ],
    )
    first, second = questions.read(path, None, 0)
    assert (first.id, first.category, first.turns, first.language) == (
        *("1", "old", ["¿Dónde está la biblioteca del pueblo?"]),
        "es",
    )
    assert (second.id, second.category, second.turns) == ("b", "general", ["First?", "Second?"])


def test_a_limit_draws_the_same_questions_again():
    drawn = [questions.read(DATA / "questions.jsonl", 6, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    numbers = [int(question.id) for question in drawn[0]]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 6


# ---- What was seen in training ----


def test_pairs_are_found_wherever_they_stand(tmp_path, tiny_base):
    template = Template(load_tokenizer(tiny_base))

    def examples(name, *items):
        path = save(tmp_path / f"{name}.json", list(items))
        return load_examples(str(path), template, 256)[0]

    training = examples(
        "training",
        {"id": "a", "conversations": said("Who are you?", "A kestrel.", "Why?", "I was made so.")},
        {"id": "b", "conversations": said("What is new?", "Nothing much.")},
    )
    measured = examples(
        "measured",
        {"id": "same pair", "conversations": said("What is new?", "Nothing much.", "Oh?", "Yes.")},
        {"id": "later pair", "conversations": said("Hm.", "Yes?", "Why?", "I was made so.")},
        {"id": "same answer", "conversations": said("How are things?", "Nothing much.")},
        {"id": "a", "conversations": said("Only the id", "is the same.")},
    )
    assert overlap.seen(measured, training) == {"same pair", "later pair"}


def test_what_an_adapter_was_trained_on(tmp_path, tiny_base, corpus):
    template = Template(load_tokenizer(tiny_base))
    assert overlap.training_examples(tmp_path, template) is None
    flags = {"data_path": str(corpus), "model_max_length": 256, "eval_ratio": 0.25, "seed": 7}
    (tmp_path / "summary.json").write_text(json.dumps({"settings": flags}))
    found = overlap.training_examples(tmp_path, template)
    trained, held_out = hold_out(load_examples(str(corpus), template, 256)[0], 0.25, 7)
    assert found.sources == trained.sources
    assert set(found.sources).isdisjoint(held_out.sources)
    flags["data_path"] = "gone.json"
    (tmp_path / "summary.json").write_text(json.dumps({"settings": flags}))
    assert overlap.training_examples(tmp_path, template) is None


# ---- The script ----


def test_base_against_adapter(tmp_path, tiny_base, tiny_adapter, corpus, evaluate):
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


def test_the_base_alone(tmp_path, tiny_base, corpus, evaluate):
    done = evaluate(
        *("--base_model", tiny_base, "--data_path", corpus, "--output_dir", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(found["held_out"]["loss"]) == [BASE]
    assert "change" not in found["held_out"]
    assert "answers" not in found


def test_the_share_that_training_held_out(tmp_path, tiny_base, tiny_adapter, corpus, evaluate):
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


def test_the_losses_are_those_that_training_measured(
    tmp_path, tiny_base, corpus, train_here, evaluate
):
    done = train_here(
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


def test_what_was_trained_on_is_told(tmp_path, tiny_base, corpus, evaluate):
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
    tmp_path, tiny_base, tiny_adapter, corpus, other_base, evaluate, change, message
):
    single = {"id": "a", "conversations": said("Why?", "No reason.")}
    long = {"id": "b", "conversations": said("Why? " * 300, "Because.")}
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
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert message in line
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


def test_nothing_to_measure_is_a_usage_error(tiny_base, evaluate):
    done = evaluate("--base_model", tiny_base)
    assert done.returncode == 2
    assert "nothing to measure" in done.stderr


# ---- The page ----


@pytest.mark.parametrize("tokenizer", ["llama_tokenizer", "byte_tokenizer"])
@pytest.mark.parametrize(
    "text", ["Ça va: 我说中文 🐦, и по-русски!\n  x", "I am", "\ufffd a \ufffd"]
)
def test_the_texts_of_tokens_are_the_whole(tokenizer, text, request):
    tokenizer = request.getfixturevalue(tokenizer)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    found = list(texts(ids, tokenizer))
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


def test_the_stronger_a_change_the_higher_its_level():
    changes = [-5, -3, -1.5, -0.3, -0.1, 0, float("nan"), 0.19, 0.2, 2, 9]
    better, worse = ([f"{side}-{level}" for level in (1, 2, 3)] for side in ("better", "worse"))
    expected = [better[2], better[2], better[1], better[0], *["same"] * 4, *worse]
    assert list(map(kind_of, changes)) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((-2.0, -3.0, -1.0), "The adapter is better"),
        ((2.0, 1.0, 3.0), "The adapter is worse"),
        ((-1.0, -3.0, 1.0), "no difference can be told"),
        ((-1.0, None, None), "too few to tell"),
    ],
)
def test_the_verdict_follows_the_interval(change, said):
    assert said in verdict(bootstrap.Estimate(*change))


@pytest.fixture(scope="module")
def hostile_base(tmp_path_factory, tiny_base) -> Path:
    """A model whose every answer is `HOSTILE`: a chain of two tokens, each known by its embedding.

    Its layers add nothing, so what comes next depends on the token before alone.
    """
    folder = tmp_path_factory.mktemp("hostile-base")
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.add_tokens([HOSTILE])
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.resize_token_embeddings(len(tokenizer))
    said_last = Template(tokenizer).prompt_ids(said("Who?"))[-1]
    hostile = tokenizer.convert_tokens_to_ids(HOSTILE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        torch.nn.init.normal_(embeddings)
        head.zero_()
        for before, after in ((said_last, hostile), (hostile, tokenizer.eos_token_id)):
            head[after] = embeddings[before] * 10
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hostile_page(tmp_path, hostile_base, evaluate) -> Path:
    """What a model, a corpus and a question file can do to a page; and words without a break."""
    items = [
        {"id": f"{HOSTILE}{n}", "conversations": said(HOSTILE, f"x {HOSTILE} {n}", "y", "z" * 300)}
        for n in range(24)
    ]
    asked = [
        {
            "question_id": HOSTILE,
            "category": HOSTILE,
            "language": f'en" {HOSTILE}',
            "text": HOSTILE,
        },
        {"question_id": 2, "category": "{{ 7 * 7 }}", "turns": ["\x1b[2J\u202e" + "w" * 500, "?"]},
    ]
    adapter_folder = adapted(hostile_base, tmp_path / f"out{HOSTILE.replace('/', '')}")
    done = evaluate(
        *("--base_model", hostile_base, "--lora_weights", adapter_folder),
        *("--data_path", save(tmp_path / "corpus.json", items)),
        *("--questions", save_lines(tmp_path / "q.jsonl", asked), "--max_new_tokens", 8),
        *("--output_dir", tmp_path / "page"),
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / "page" / "evaluation.html"


class Elements(HTMLParser):
    """What a parser that knows no policy sees: the tags and their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes


def test_text_of_the_models_stays_text(hostile_page):
    page = hostile_page.read_text(encoding="utf-8")
    seen = Elements(page)
    assert seen.tags.isdisjoint({"script", "img", "iframe", "object", "form"})
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name == "style"]
    sources = [value for name, value in seen.attributes if name in ("src", "href")]
    assert all(value == "data:," or value.startswith("#category-") for value in sources)
    assert "{{ 7 * 7 }}" in page
    assert "\x1b" not in page
    assert "\u202e" not in page


@needs_chromium
def test_in_a_browser(hostile_page, tmp_path):
    with opened(hostile_page, tmp_path / "profile") as page:
        answer = "document.querySelector('.answer.base .text').textContent"
        assert page.run(answer) == HOSTILE
        assert page.run("document.querySelector('.question').textContent") == HOSTILE
        tops = "[...document.querySelectorAll('.asked .pair')[0].children]"
        tops += ".map(x => Math.round(x.getBoundingClientRect().top))"
        colours = set()
        for width, height, dark in ((1280, 900, False), (1280, 900, True), (400, 800, False)):
            page.screenshot(tmp_path / "shot.png", width, height, dark)
            assert page.run("document.documentElement.scrollWidth") == width
            first, second = page.run(tops)
            assert (first == second) is (width > 400)  # beside each other where there is room
            colours.add(page.run("getComputedStyle(document.body).backgroundColor"))
        assert len(colours) == 2
        assert page.run("document.querySelectorAll('svg').length") == 2
        bar = "document.querySelector('svg .better rect, svg .worse rect')"
        assert page.run(f"getComputedStyle({bar}).fill") != "rgb(0, 0, 0)"
        assert page.run("window.hacked") is None
        assert page.requests == [hostile_page.as_uri()]
        assert not page.complaints
