"""Masks that are drawn again instead of kept: what they depend on, and how random they are."""

import numpy as np
import pytest
import torch

from llama_lora.train.compute import lora_layers
from llama_lora.train.compute.dropout import Dropout, keys_in_step
from llama_lora.train.data.example import Example
from llama_lora.train.data.packing import collate
from llama_lora.train.memory.out_of_memory import Gradients
from tests.train.adapted import adapted_llama, trainable

WIDTH = 300


def masks(dropout: Dropout, keys: torch.Tensor) -> torch.Tensor:
    """[inputs, tokens, width]"""
    dropout.draw(keys)
    return torch.stack(
        [dropout.rows(dropout.begins(number), WIDTH) for number in range(dropout.inputs)]
    )


@pytest.fixture
def dropout():
    made = Dropout(0.1, seed=3, device=torch.device("cpu"))
    for _ in range(3):
        made.add_input()
    return made


def test_rows_are_alike_only_by_chance(dropout):
    drawn = masks(dropout, torch.arange(200)[None]).flatten(0, 1).float()
    assert drawn.mean().item() == pytest.approx(0.9, abs=0.005)
    centred = drawn - drawn.mean()
    alike = (centred @ centred.T) / (0.09 * WIDTH)  # correlations of all pairs of rows
    alike.fill_diagonal_(0)
    assert alike.mean().abs() < 0.001
    assert alike.std().item() == pytest.approx(WIDTH**-0.5, rel=0.05)
    shares = drawn.mean(0)  # of each column
    assert shares.std().item() == pytest.approx((0.09 / len(drawn)) ** 0.5, rel=0.2)


def test_a_token_keeps_its_mask_wherever_it_stands(dropout):
    keys = torch.arange(50)[None] * 7919
    whole, moved = masks(dropout, keys), masks(dropout, keys.roll(11, 1))
    assert torch.equal(moved.roll(-11, 1), whole)
    with dropout.only(slice(11, 20)):
        assert torch.equal(dropout.rows(dropout.begins(1), WIDTH), moved[1, 11:20])


def test_another_step_seed_or_input_has_other_masks(dropout):
    keys = torch.arange(50)[None]
    first = masks(dropout, keys_in_step(keys, 0))
    assert torch.equal(masks(dropout, keys_in_step(keys, 0)), first)
    other = Dropout(0.1, seed=4, device=torch.device("cpu"))
    other.inputs = 3
    later = masks(dropout, keys_in_step(keys, 1))
    for different in (later, masks(other, keys), first.roll(1, 0)):
        same = (different == first).float().mean(2)
        assert same.mean().item() == pytest.approx(0.9**2 + 0.1**2, abs=0.01)
        assert same.max() < 1


@pytest.mark.parametrize("step", [10_000, 10**7, 2**40])
def test_no_step_is_too_late(dropout, step):
    keys = collate([[Example("a chat", "", np.arange(9), np.arange(9))]])["token_keys"]
    first = masks(dropout, keys_in_step(keys, step))
    assert not torch.equal(first, masks(dropout, keys_in_step(keys, step + 1)))


def test_a_row_of_any_width(dropout):
    dropout.draw(torch.arange(5)[None])
    wide = dropout.rows(dropout.begins(0), 64)
    for width in (1, 7, 8, 63):
        assert torch.equal(dropout.rows(dropout.begins(0), width), wide[:, :width])


def test_a_step_that_is_divided_otherwise_drops_the_same(tmp_path):
    model = adapted_llama(tmp_path, dropout=0.3)
    rows = [np.arange(5 + 3 * n, dtype=np.int32) % 61 for n in range(6)]
    examples = [Example(f"chat {n}", "", row, row) for n, row in enumerate(rows)]

    def gradients(parts, examples=examples):
        batch = collate([examples])
        del batch["names"]
        compute = Gradients(trainable(model), pytest.fail, parts).compute
        return compute(lambda part: model(**part, num_items_in_batch=100).loss, batch, 1.0)

    loss, found = gradients(1)
    for parts, order in ((2, 1), (6, 1), (1, -1)):
        other, others = gradients(parts, examples[::order])
        assert other.item() == pytest.approx(loss.item(), rel=1e-6)
        for a, b in zip(found, others, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert lora_layers.dropout_of(model).share == 0.3
    plain, _ = gradients(1, [Example("another", "", *(one.ids, one.labels)) for one in examples])
    assert abs(plain - loss) > 1e-3  # otherwise nothing was dropped


def test_what_is_measured_is_not_dropped(tmp_path):
    model = adapted_llama(tmp_path, dropout=0.3).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        measured = model(input_ids=ids).logits
        model.train()
        assert not torch.allclose(model(input_ids=ids).logits, measured, atol=1e-3)
