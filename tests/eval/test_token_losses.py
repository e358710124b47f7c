"""Losses of held-out conversations are those of plain forward passes, and how far to trust them."""

import json
import logging

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llama_lora.chat.adapters import BASE, load_adapters
from llama_lora.cli import InputError
from llama_lora.eval import bootstrap, contamination
from llama_lora.eval.token_losses import labelled_counts, summed_losses, token_changes
from llama_lora.model.labels import IGNORE
from llama_lora.model.template import Template, load_tokenizer
from llama_lora.train.data.examples import hold_out, load_examples
from tests.corpora import conversation, save
from tests.eval.evaluation import SIDES, plain_losses


def test_losses_are_those_of_plain_forward_passes(tiny_base, tiny_adapter, corpus):
    adapters, _ = load_adapters(tiny_base, {"adapter": tiny_adapter})
    examples, _ = load_examples(str(corpus), adapters.templates["adapter"], 256)
    sums = summed_losses(adapters, SIDES, examples, 256, {})
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
        return summed_losses(adapters, SIDES, examples, 256, {})

    found, whole = measured(quantization), measured("none")
    for side in SIDES:
        np.testing.assert_allclose(found[side], whole[side], rtol=0.05)
    changes = [sums["adapter"] - sums[BASE] for sums in (found, whole)]
    assert np.corrcoef(*changes)[0, 1] > 0.9


def test_measuring_leaves_the_model_as_it_was(tiny_base, tiny_adapter, corpus):
    adapters, _ = load_adapters(tiny_base, {"adapter": tiny_adapter})
    model = adapters.model.get_base_model()
    before, attributes = model(torch.arange(9)[None]).logits, set(vars(model))
    attention = model.config._attn_implementation
    examples, _ = load_examples(str(corpus), adapters.templates["adapter"], 256)
    summed_losses(adapters, SIDES, examples, 256, {})
    assert set(vars(model)) == attributes
    assert model.config._attn_implementation == attention
    assert torch.equal(model(torch.arange(9)[None]).logits, before)


def test_a_pass_that_memory_does_not_do_for_is_made_in_parts(
    tiny_base, tiny_adapter, corpus, caplog
):
    adapters, _ = load_adapters(tiny_base, {"adapter": tiny_adapter})
    examples, _ = load_examples(str(corpus), adapters.templates["adapter"], 256)
    longest, whole = max(examples.lengths), summed_losses(adapters, SIDES, examples, 256, {})

    def small(most: int):
        """A hook that refuses larger passes as a card does that has too little memory."""

        def refuse(_, inputs):
            if inputs[0].shape[1] > most:
                raise torch.AcceleratorError("CUDA error: out of memory")

        return refuse

    embeddings = adapters.model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(small(longest))
    try:
        with caplog.at_level(logging.WARNING, "llama_lora"):
            parts = summed_losses(adapters, SIDES, examples, 256, {})
    finally:
        hook.remove()
    for side in SIDES:
        np.testing.assert_allclose(parts[side], whole[side], rtol=1e-6)
    said = [record.message for record in caplog.records]
    assert said[0] == (
        "out of memory: from now on, every forward pass is computed in 2 parts; the loss stays the "
        "same"
    )
    assert len(said) == len(set(said))
    hook = embeddings.register_forward_pre_hook(small(longest - 1))
    try:
        with pytest.raises(InputError, match=f"one example of {longest} tokens.* --max_length"):
            summed_losses(adapters, SIDES, examples, 256, {})
    finally:
        hook.remove()


def test_changes_token_by_token_add_up(tiny_base, tiny_adapter, corpus):
    adapters, _ = load_adapters(tiny_base, {"adapter": tiny_adapter})
    examples, _ = load_examples(str(corpus), adapters.templates["adapter"], 256)
    sums = summed_losses(adapters, SIDES, examples, 256, {})
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


def test_pairs_are_found_wherever_they_stand(tmp_path, tiny_base):
    template = Template(load_tokenizer(tiny_base))

    def examples(name, *items):
        path = save(tmp_path / f"{name}.json", list(items))
        return load_examples(str(path), template, 256)[0]

    training = examples(
        "training",
        conversation("a", "Who are you?", "A kestrel.", "Why?", "I was made so."),
        conversation("b", "What is new?", "Nothing much."),
    )
    measured = examples(
        "measured",
        conversation("same pair", "What is new?", "Nothing much.", "Oh?", "Yes."),
        conversation("later pair", "Hm.", "Yes?", "Why?", "I was made so."),
        conversation("same answer", "How are things?", "Nothing much."),
        conversation("a", "Only the id", "is the same."),
    )
    assert contamination.seen(measured, training) == {"same pair", "later pair"}


def test_what_an_adapter_was_trained_on(tmp_path, tiny_base, corpus):
    template = Template(load_tokenizer(tiny_base))
    assert contamination.training_examples(tmp_path, template) is None
    flags = {"data_path": str(corpus), "model_max_length": 256, "eval_ratio": 0.25, "seed": 7}
    (tmp_path / "summary.json").write_text(json.dumps({"settings": flags}))
    found = contamination.training_examples(tmp_path, template)
    trained, held_out = hold_out(load_examples(str(corpus), template, 256)[0], 0.25, 7)
    assert found.sources == trained.sources
    assert set(found.sources).isdisjoint(held_out.sources)
    flags["data_path"] = "gone.json"
    (tmp_path / "summary.json").write_text(json.dumps({"settings": flags}))
    assert contamination.training_examples(tmp_path, template) is None
