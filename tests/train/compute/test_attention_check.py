"""Attention as the base asks for it: its windows are kept to, and what is not known is refused."""

import functools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AttentionInterface, AutoModelForCausalLM

from llama_lora.cli import InputError
from llama_lora.eval.token_losses import labelled_counts
from llama_lora.hardware.device import DTYPE_SWITCH
from llama_lora.model.folder.config import beyond_positions, positions, read_config
from llama_lora.model.labels import IGNORE
from llama_lora.model.template import Template, load_tokenizer
from llama_lora.train.compute import attention_check, packed_attention
from llama_lora.train.compute.attention_kernels import VARLEN
from llama_lora.train.compute.packed_attention import BY_EXAMPLE, attend_within_examples
from llama_lora.train.data.example import Example
from llama_lora.train.data.examples import hold_out, load_examples
from llama_lora.train.data.packing import check_isolation, collate
from llama_lora.train.plan import time_estimate
from tests.conftest import TRAIN, error_line, run_here, shipped
from tests.corpora import conversation, save
from tests.eval.evaluation import evaluate, plain_losses
from tests.train.compute import bases
from tests.train.compute.bases import WINDOW
from tests.train.compute.kernels import masked_product

WINDOWED = ["mistral", "phi3", "gemma3", "qwen2"]
SPLIT = "fastchat/data/split_long_conversation.py"


# ---------------------------------------------------------------------- the product itself


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of queries of which some examples of a few tokens have several."""
    monkeypatch.setattr(packed_attention, "BLOCK", 8)
    packed_attention._band.cache_clear()
    yield
    packed_attention._band.cache_clear()


def assert_the_same(lengths, window, groups):
    generator = torch.Generator().manual_seed(sum(lengths))
    heads = (2 * groups, 2, 2)
    given = [torch.randn(1, n, sum(lengths), 4, generator=generator) for n in heads]
    upstream = torch.randn(given[0].shape, generator=generator)
    found, expected = ([one.clone().requires_grad_() for one in given] for _ in range(2))
    result, _ = attend_within_examples(None, *found, window, example_lengths=lengths)
    product = masked_product(*expected, lengths, window)
    torch.testing.assert_close(result.transpose(1, 2), product, rtol=0, atol=2e-6)
    for one, other in zip(
        torch.autograd.grad(result.transpose(1, 2), found, upstream),
        torch.autograd.grad(product, expected, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_values_and_gradients_are_those_of_a_masked_product(short_blocks):
    lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)
    windows = st.none() | st.integers(1, 41)
    given(lengths, windows, st.sampled_from([1, 2, 3]))(assert_the_same)()


def test_a_long_example_is_that_of_a_masked_product():
    assert_the_same([700, 2500], 600, 1)


def test_only_what_a_window_holds_is_ever_there():
    """Twice the tokens take twice the memory, and hardly more than without a window."""
    from llama_lora.train.memory.gradient_checkpointing import LiveBytes

    def peak(tokens, window):
        row = torch.ones(1, 2, tokens, 4, requires_grad=True)
        with LiveBytes() as live:
            result, _ = attend_within_examples(None, row, row, row, window)
            torch.autograd.grad(result.sum(), row)
        return live.peak

    peak(4000, 500)  # with it the mask for all that follow
    assert peak(8000, 500) <= 2.1 * peak(4000, 500)
    assert peak(8000, 500) <= 2 * peak(8000, None)


# ---------------------------------------------------------------------- whole models


@pytest.mark.parametrize("kind", WINDOWED)
def test_packed_rows_are_each_example_alone_under_eager_attention(kind):
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randint(3, 99, (n,), generator=generator) for n in (55, 9, 16, 17, 40)]
    row = collate(
        [[Example("", "", ids.numpy(), np.full(len(ids), IGNORE, np.int32)) for ids in parts]]
    )
    for ours in ("labels", "names", "labelled", "example_labelled", "token_keys"):
        del row[ours]
    packed = bases.model(kind, BY_EXAMPLE)(**row, use_cache=False).logits[0]
    eager, wide = bases.model(kind, "eager"), bases.model(kind, "eager", sliding_window=400)
    alone = torch.cat([eager(ids[None], use_cache=False).logits[0] for ids in parts])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)
    without = torch.cat([wide(ids[None], use_cache=False).logits[0] for ids in parts])
    assert (without - alone).abs().max() > 0.3  # otherwise nothing was tested


@pytest.mark.parametrize("kind", ["mistral", "olmo2"])
def test_a_base_is_trained_and_measured_as_it_computes_by_itself(
    kind, tmp_path, llama_tokenizer, monkeypatch
):
    monkeypatch.setenv(DTYPE_SWITCH, "float32")
    base = bases.saved(tmp_path / "base", kind, llama_tokenizer)
    corpus = save(tmp_path / "split.json", shipped("dummy_en.json")[:12])
    out = tmp_path / "out"
    done = run_here(
        TRAIN,
        *("--model_name_or_path", base, "--data_path", corpus, "--output_dir", out),
        *("--model_max_length", 256, "--eval_ratio", 0.25, "--quantization", "none"),
        *("--max_steps", 2, "--learning_rate", 0.01, "--lora_dropout", 0),
    )
    assert done.returncode == 0, done.stderr
    trained = json.loads((out / "summary.json").read_text())

    flags = "--max_length", 256, "--eval_ratio", 0.25, "--output_dir", tmp_path / "measured"
    done = evaluate("--base_model", base, "--lora_weights", out, "--data_path", corpus, *flags)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "measured" / "evaluation.json").read_text())["held_out"]

    examples, _ = load_examples(str(corpus), Template(load_tokenizer(base)), 256)
    _, held_out = hold_out(examples, 0.25, 42)
    assert min(held_out.lengths) > 2 * WINDOW
    eager = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    for side, when in (("base", "before"), ("adapter", "after")):
        expected = sum(plain_losses(eager, held_out)) / labelled_counts(held_out).sum()
        assert trained[f"held_out_loss_{when}"] == pytest.approx(expected, rel=1e-5)
        assert measured["loss"][side]["value"] == pytest.approx(expected, rel=1e-5)
        eager = PeftModel.from_pretrained(eager, out).eval()


# ---------------------------------------------------------------------- before weights are loaded


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mistral", [WINDOW, WINDOW]),
        ("phi3", [WINDOW, WINDOW]),
        ("gemma3", [WINDOW, None]),
        ("qwen2", [None, WINDOW]),
    ],
)
def test_the_windows_of_a_bases_layers(kind, expected, tmp_path):
    bases.config(kind).save_pretrained(tmp_path)
    assert attention_check.windows(tmp_path) == expected


def test_a_window_that_is_not_in_use_is_none(tmp_path):
    bases.config("qwen2", use_sliding_window=False).save_pretrained(tmp_path)
    assert attention_check.windows(tmp_path) == [None, None]


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("llama4_text", {}, "neither causal nor a window"),
        ("gemma3", {"use_bidirectional_attention": True}, "neither causal nor a window"),
        ("qwen3_next", {}, "cannot see how its layers attend"),
        ("stablelm", {}, "not told where the examples of a row end"),
        ("nemotron", {}, "not told where the examples of a row end"),
    ],
)
def test_other_attention_is_refused(kind, more, expected, tmp_path):
    bases.config(kind, **more).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=expected):
        attention_check.windows(tmp_path)


@pytest.mark.parametrize(("kind", "named"), [("gpt_oss", "s_aux"), ("gemma2", "softcap")])
def test_sinks_and_soft_caps_are_refused_before_weights_are_loaded(
    kind, named, tmp_path, llama_tokenizer
):
    """There are none to load."""
    base = bases.saved(tmp_path / "base", kind, llama_tokenizer, weights=False)
    corpus = save(tmp_path / "split.json", [conversation("a", "Why?", "No reason.")])
    train = "--model_name_or_path", base, "--data_path", corpus, "--output_dir", tmp_path / "out"
    for done in (
        run_here(TRAIN, *train, "--dry_run", "True"),
        run_here(TRAIN, *train),
        evaluate("--base_model", base, "--data_path", corpus, "--output_dir", tmp_path),
    ):
        line = error_line(done)
        assert f"{base}: its layers attend with {named};" in line
        assert "use another base" in line


@pytest.mark.parametrize(
    "asked",
    [{"s_aux": torch.zeros(2)}, {"softcap": 50.0}, {"sliding_window": 9}, {"is_causal": False}],
    ids=lambda asked: next(iter(asked)),
)
def test_no_keyword_is_swallowed(asked):
    row = torch.ones(1, 2, 20, 4)
    with pytest.raises(InputError):
        attend_within_examples(None, row, row, row, WINDOW, **asked)
    attend_within_examples(None, row, row, row, WINDOW, **dict.fromkeys(asked))


# ---------------------------------------------------------------------- before the first step


def without_windows(module, query, key, value, attention_mask, **others):
    others["sliding_window"] = None
    return attend_within_examples(module, query, key, value, None, **others)


def one_key_more(module, query, key, value, attention_mask, **others):
    others["sliding_window"] = None
    return attend_within_examples(
        module, query, key, value, attention_mask and attention_mask + 1, **others
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_are_checked_and_left_as_they_were(kind, dtype):
    model = bases.model(kind, BY_EXAMPLE, sliding_window=48).to(dtype).train()
    ids = torch.arange(60)[None]
    before = model(ids, use_cache=False).logits
    check_isolation(model)
    try:
        for faulty in (without_windows, one_key_more):
            AttentionInterface.register(BY_EXAMPLE, faulty)
            with pytest.raises(InputError, match="is off by"):
                check_isolation(model)
    finally:
        AttentionInterface.register(BY_EXAMPLE, attend_within_examples)
    assert model.config._attn_implementation == BY_EXAMPLE
    assert model.config.sliding_window == 48
    assert model.training
    assert torch.equal(model(ids, use_cache=False).logits, before)


def test_a_base_that_names_its_arguments_passes_the_check():
    check_isolation(bases.model("afmoe", BY_EXAMPLE))


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantized_bases_pass_the_check(quantization, tmp_path, llama_tokenizer):
    from llama_lora.model.base import load_base

    folder = bases.saved(tmp_path, "mistral", llama_tokenizer)
    model = load_base(folder, quantization)
    model.set_attn_implementation(BY_EXAMPLE)
    check_isolation(model)


# ---------------------------------------------------------------------- time and positions


def test_what_a_window_saves():
    lengths = np.array([10, 5000])
    plain, windowed = (
        time_estimate.EpochWork.of(lengths, 0, windows).attended
        for windows in ([None], [1000, 1000])
    )
    assert plain == 10**2 + 5000**2
    assert windowed == 10**2 + 1000**2 + 2 * 4000 * (1000 + packed_attention.BLOCK)
    on_card = time_estimate.EpochWork.of(lengths, 0, [1000], VARLEN).attended
    assert on_card == 10**2 + 1000**2 + 2 * 4000 * 1000
    assert time_estimate.EpochWork.of(lengths, 0, [None, 1000]).attended == (plain + windowed) // 2
    assert time_estimate.EpochWork.of(lengths, 0, [9000]).attended == plain


STRETCHED = {
    "none": ({}, 512),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 2048),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 1024),
    "yarn from fewer": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        512,
    ),
    "yarn from all": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        2048,
    ),
}


@pytest.mark.parametrize("kind", STRETCHED)
def test_how_many_positions_a_base_has(kind, tmp_path):
    rope, expected = STRETCHED[kind]
    more = {"rope_parameters": {"rope_theta": 10_000.0, **rope}} if rope else {}
    bases.config("mistral", **more).save_pretrained(tmp_path)
    assert positions(read_config(tmp_path)) == expected
    limit = positions(read_config(tmp_path), packed=True)
    assert beyond_positions(tmp_path, "--max-length", limit) is None
    assert f"use --max-length {limit}, or" in beyond_positions(tmp_path, "--max-length", limit + 1)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 512),
        (
            {
                "rope_type": "longrope",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0] * 4,
                "long_factor": [3.0] * 4,
            },
            32,
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_examples_that_would_change_the_angles_of_others_are_refused(rope, limit, tmp_path):
    """Below the limit an example is what it is alone; one token beyond it is not."""
    more = {"max_position_embeddings": 512, "head_dim": 8}
    more["rope_parameters"] = {"rope_theta": 10_000.0, **rope}
    model = bases.model("mistral", BY_EXAMPLE, sliding_window=None, **more).eval()
    model.config.save_pretrained(tmp_path)
    assert beyond_positions(tmp_path, "--model_max_length", limit) is None
    said = beyond_positions(tmp_path, "--model_max_length", limit + 1)
    assert f"rotary angles that an example of over {limit} tokens would change" in said

    def change(long: int) -> float:
        """In the logits of a short example, by one of so many tokens after it."""
        ids = torch.arange(10 + long)[None] % 60
        positions = torch.cat([torch.arange(10), torch.arange(long)])[None]
        packed = {"position_ids": positions, "example_lengths": [10, long]}
        with torch.no_grad():
            alone = model(input_ids=ids[:, :10], use_cache=False).logits
            return (model(input_ids=ids, **packed).logits[:, :10] - alone).abs().max().item()

    assert change(limit) < 1e-5 < 1e-3 < change(limit + 1)


def test_a_tokenizer_alone_has_no_limit(tmp_path, llama_tokenizer):
    llama_tokenizer.save_pretrained(tmp_path)
    assert beyond_positions(tmp_path, "--max-length", 10**9) is None


@pytest.mark.parametrize("more", [[], ["--dry_run", "True"]], ids=["training", "dry run"])
def test_training_beyond_the_positions_is_refused(more, tiny_base, tmp_path):
    corpus = save(tmp_path / "split.json", [conversation("a", "Why?", "No reason.")])
    done = run_here(
        TRAIN,
        *("--model_name_or_path", tiny_base, "--data_path", corpus),
        *("--output_dir", tmp_path / "out", "--model_max_length", 513, *more),
    )
    assert "--model_max_length 513" in error_line(done)
    assert "made for 512 tokens" in error_line(done)


def test_splitting_beyond_the_positions_warns(tiny_base, tmp_path):
    corpus = save(tmp_path / "kept.json", [conversation("a", "Why?", "No reason.")])
    split = functools.partial(
        *(run_here, SPLIT, "--in", corpus, "--out", tmp_path / "split.json"),
        *("--model-name", tiny_base, "--workers", 1, "--max-length"),
    )
    done = split(513)
    assert done.returncode == 0, done.stderr
    assert "warning: --max-length 513" in done.stderr
    assert "made for 512 tokens" in done.stderr
    assert "warning" not in split(512).stderr
