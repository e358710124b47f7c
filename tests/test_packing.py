"""Packed rows train exactly what separate examples would."""

import numpy as np
import pytest
import torch
from conftest import shipped
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from llama_lora.cli import InputError
from llama_lora.model.template import IGNORE, Template
from llama_lora.train.examples import Example
from llama_lora.train.packing import Rows, best_fit_decreasing, check_isolation, collate


@settings(max_examples=300)
@given(st.lists(st.integers(1, 64), max_size=60), st.integers(64, 80))
def test_every_item_is_packed_once_and_no_row_overflows(lengths, capacity):
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in row) for row in rows]
    assert all(0 < load <= capacity for load in loads)
    # No two rows could have been one: what any fit-the-open-row heuristic guarantees.
    assert all(a + b > capacity for a, b in zip(sorted(loads), sorted(loads)[1:], strict=False))


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60), st.randoms())
def test_the_number_of_rows_does_not_depend_on_the_order(lengths, rng):
    shuffled = rng.sample(lengths, len(lengths))
    assert len(best_fit_decreasing(lengths, 64)) == len(best_fit_decreasing(shuffled, 64))


@pytest.fixture(scope="module")
def examples(llama_tokenizer) -> list[Example]:
    samples = shipped("dummy_en.json")
    return [
        Example(str(i), str(i), np.array(e.ids, np.int32), np.array(e.labels, np.int32))
        for i, e in enumerate(Template(llama_tokenizer).encode_batch(samples))
    ]


@pytest.fixture(scope="module")
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation="sdpa").eval()


def loss_and_gradients(model, batches):
    """Loss per labelled token over `batches`, and the gradient of every weight."""
    model.zero_grad()
    count = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**batch, use_cache=False).loss * int((batch["labels"] != IGNORE).sum())
        (loss / count).backward()
        total += loss.item() / count
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_packed_loss_and_gradients_equal_separate_ones(model, examples):
    """Against each example alone, unpadded, with neither positions nor mask given."""
    rows = Rows(examples[:40], capacity=256, packing=True, group=4, seed=0)
    assert len(rows) <= len(examples[:40]) / 2
    packed, packed_gradients = loss_and_gradients(
        model, [collate([rows[i] for i in range(len(rows))])]
    )
    alone = [
        {
            "input_ids": torch.from_numpy(example.ids).long()[None],
            "labels": torch.from_numpy(example.labels).long()[None],
        }
        for example in examples[:40]
    ]
    separate, separate_gradients = loss_and_gradients(model, alone)
    assert packed == pytest.approx(separate, abs=1e-5)
    for name, gradient in separate_gradients.items():
        assert torch.allclose(packed_gradients[name], gradient, atol=1e-5), name


def test_padding_does_not_change_the_loss(model, examples):
    rows = Rows(examples[:8], capacity=256, packing=False, group=4, seed=0)
    together, _ = loss_and_gradients(model, [collate([rows[i] for i in range(8)])])
    apart, _ = loss_and_gradients(model, [collate([rows[i]]) for i in range(8)])
    assert together == pytest.approx(apart, abs=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_hold_everything_once_in_an_order_of_their_own(packing, examples):
    def order(seed, epoch):
        rows = Rows(examples, capacity=256, packing=packing, group=4, seed=seed)
        rows.set_epoch(epoch)
        return [[example.id for example in rows[i]] for i in range(len(rows))]

    assert order(0, 3) == order(0, 3)
    assert len({str(order(*which)) for which in ((0, 0), (0, 1), (1, 0))}) == 3
    for epoch in range(3):
        ids = [id for row in order(0, epoch) for id in row]
        assert sorted(ids) == sorted(example.id for example in examples)
        assert len(order(0, epoch)) == len(order(0, 0))


def test_isolation_holds(model):
    check_isolation(model)


def test_a_model_that_attends_across_examples_is_refused(model, monkeypatch):
    """A mask of ones, as many a collator gives, is enough to lose isolation in silence."""
    forward = model.forward

    def with_mask(input_ids, **rest):
        return forward(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **rest)

    monkeypatch.setattr(model, "forward", with_mask)
    with pytest.raises(InputError, match="--packing False"):
        check_isolation(model)
