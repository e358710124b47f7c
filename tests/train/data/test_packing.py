"""Packed rows train exactly what separate examples would."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from llama_lora.cli import InputError
from llama_lora.model.labels import IGNORE
from llama_lora.model.template import Template
from llama_lora.train.compute.packed_attention import BY_EXAMPLE
from llama_lora.train.data.example import Example
from llama_lora.train.data.packing import (
    MicroBatches,
    best_fit_decreasing,
    check_isolation,
    collate,
)
from tests.conftest import shipped


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


class Listed(list):
    """Examples in memory."""

    lengths_given = None

    @property
    def lengths(self):
        return self.lengths_given or [len(example.ids) for example in self]

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return Listed(found) if isinstance(index, slice) else found


@pytest.fixture(scope="module")
def examples(llama_tokenizer) -> Listed:
    samples = shipped("dummy_en.json")
    return Listed(
        Example(str(i), str(i), np.array(e.ids, np.int32), np.array(e.labels, np.int32))
        for i, e in enumerate(Template(llama_tokenizer).encode_batch(samples))
    )


@pytest.fixture(scope="module")
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation=BY_EXAMPLE).eval()


@pytest.fixture(scope="module")
def plain_model(tiny_base):
    """The same model as transformers computes it by itself."""
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


@pytest.mark.parametrize("packing", [True, False])
def test_packed_loss_and_gradients_equal_separate_ones(packing, model, plain_model, examples):
    """Against each example alone, unpadded, with neither positions nor mask given."""
    some = examples[:40]
    together = MicroBatches(some, max_length=256, size=4, packing=packing)
    assert len(together) <= 5 if packing else len(together) == 10
    batches = [collate([together[i]]) for i in range(len(together))]
    for batch in batches:
        for ours in ("names", "labelled", "example_labelled", "token_keys"):
            del batch[ours]
    packed, packed_gradients = loss_and_gradients(model, batches)
    alone = [
        {
            "input_ids": torch.from_numpy(example.ids).long()[None],
            "labels": torch.from_numpy(example.labels).long()[None],
        }
        for example in some
    ]
    separate, separate_gradients = loss_and_gradients(plain_model, alone)
    assert packed == pytest.approx(separate, abs=1e-5)
    for name, gradient in separate_gradients.items():
        assert torch.allclose(packed_gradients[name], gradient, atol=1e-5), name


def test_what_an_example_begins_with_is_not_learned_from_the_one_before():
    four = np.arange(4, dtype=np.int32)
    batch = collate([[Example(name, name, four, four) for name in "ab"]])
    assert batch["labels"].tolist() == [[IGNORE, 1, 2, 3, IGNORE, 1, 2, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]


def test_empty_micro_batches_even_out_the_processes_and_teach_nothing(examples):
    batches = MicroBatches(examples[:5], max_length=4096, size=1, processes=4)
    assert len(batches) == 4
    assert sorted(len(batches[i]) for i in range(4)) == [0, 0, 0, 5]
    assert collate([[]])["labels"].tolist() == [[IGNORE]]


@settings(max_examples=50)
@given(st.lists(st.integers(100, 512), min_size=400, max_size=500))
def test_micro_batches_of_many_lengths_are_full(lengths):
    none = np.zeros(0, np.int32)
    examples = Listed(Example("", "", none, none) for _ in lengths)
    examples.lengths_given = lengths
    batches = MicroBatches(examples, max_length=512, size=14)
    assert batches.fill >= 0.9
    full = [sum(lengths[i] for i in members) for members in batches.members]
    assert sum(full) - min(full) >= 0.98 * (len(full) - 1) * batches.capacity


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_hold_everything_once_in_an_order_of_their_own(packing, examples):
    def order(seed, epoch):
        batches = MicroBatches(examples, max_length=256, size=2, packing=packing, seed=seed)
        batches.set_epoch(epoch)
        return [[example.id for example in batches[i]] for i in range(len(batches))]

    assert order(0, 3) == order(0, 3)
    assert len({str(order(*which)) for which in ((0, 0), (0, 1), (1, 0))}) == 3
    for epoch in range(3):
        ids = [id for batch in order(0, epoch) for id in batch]
        assert sorted(ids) == sorted(example.id for example in examples)
        assert len(order(0, epoch)) == len(order(0, 0))


def test_isolation_holds(model):
    check_isolation(model)


def test_rounding_is_no_leak(model):
    """In 16 bits a row of another shape may come out far from the same examples elsewhere."""
    forward = model.forward

    def rounding(input_ids, **rest):
        output = forward(input_ids=input_ids, **rest)
        torch.manual_seed(input_ids.shape[1])
        output.logits += 0.1 * output.logits.std() * torch.randn_like(output.logits)
        return output

    model.forward = rounding
    check_isolation(model)
    del model.forward


def test_a_model_whose_positions_do_not_restart_is_refused(model):
    forward = model.forward
    table = 10 * torch.randn(64, model.config.vocab_size)  # learned, as GPT-2's are

    def by_place(input_ids, position_ids=None, **rest):
        output = forward(input_ids=input_ids, **rest)
        output.logits = output.logits + table[: input_ids.shape[1]]
        return output

    model.forward = by_place
    with pytest.raises(InputError, match="as if each were alone"):
        check_isolation(model)
    del model.forward


def test_a_model_that_attends_across_examples_is_refused(plain_model):
    """As transformers' own attention does once a mask of ones is given."""
    forward = plain_model.forward

    def with_mask(input_ids, example_lengths=None, **rest):
        mask = torch.ones_like(input_ids)
        return forward(input_ids=input_ids, attention_mask=mask, **rest)

    plain_model.forward = with_mask
    with pytest.raises(InputError, match="not kept apart"):
        check_isolation(plain_model)
    del plain_model.forward
