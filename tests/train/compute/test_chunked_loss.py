"""The chunked loss is the plain one, and a gradient transaction adds up to one backward pass."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from llama_lora.cli import InputError
from llama_lora.model.labels import IGNORE
from llama_lora.train.compute import chunked_loss
from llama_lora.train.data.example import Example
from llama_lora.train.data.packing import collate
from llama_lora.train.memory.out_of_memory import Gradients, split


def random_head(tokens: int, words: int, labelled: float, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(words, 16, dtype=dtype)
    labels = torch.randint(words, (tokens,))
    labels[torch.rand(tokens) > labelled] = IGNORE
    return hidden, weight, labels


@pytest.mark.parametrize("labelled", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_chunked_loss_and_gradient_equal_the_plain_ones(labelled, chunk_rows, monkeypatch):
    hidden, weight, labels = random_head(50, 40, labelled)
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", chunk_rows * 40 * 4)
    logits = hidden @ weight.T
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (expected,) = torch.autograd.grad(plain * 3, hidden)
    chunked = chunked_loss.linear_cross_entropy(hidden, weight, labels)
    (found,) = torch.autograd.grad(chunked * 3, hidden)
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-6)
    assert torch.allclose(found, expected, atol=1e-5)


def test_where_labels_are_need_not_be_looked_for():
    hidden, weight, labels = random_head(50, 40, 0.3)
    known = (labels != IGNORE).nonzero()[:, 0]
    found, expected = [], []
    for rows, kept in ((known, found), (None, expected)):
        loss = chunked_loss.linear_cross_entropy(hidden, weight, labels, rows)
        kept += [loss.detach(), *torch.autograd.grad(loss, hidden)]
    assert all(map(torch.equal, found, expected))


def test_half_precision_is_summed_in_full(monkeypatch):
    """Against fp64: a sum kept in fp16 would be off by whole units at this size."""
    hidden, weight, labels = random_head(4000, 300, 1.0, torch.float16)
    logits = (hidden.double() @ weight.double().T).detach().requires_grad_()
    exact = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(exact, logits)
    found = chunked_loss.linear_cross_entropy(hidden, weight, labels)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)
    (of_hidden,) = torch.autograd.grad(found, hidden)
    assert torch.allclose(of_hidden.double(), gradient @ weight.double(), atol=0.02)


def test_a_model_gives_the_same_loss_with_and_without_its_logits(tiny_base):
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    chunked = AutoModelForCausalLM.from_pretrained(tiny_base)
    chunked_loss.compute_in_chunks(chunked)
    ids = torch.arange(60).reshape(2, 30) % 50
    labels = ids.masked_fill(ids % 3 == 0, IGNORE)
    for items in (None, 17):
        expected = plain(input_ids=ids, labels=labels, num_items_in_batch=items).loss
        found = chunked(input_ids=ids, labels=labels, num_items_in_batch=items)
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert found.logits is None
    assert torch.equal(chunked(input_ids=ids).logits, plain(input_ids=ids).logits)


def batch_of(lengths: list[int]) -> dict:
    parts = [np.arange(length, dtype=np.int32) + 1 for length in lengths]
    labels = [np.where(part % 3, part, IGNORE) for part in parts]
    batch = collate([[Example("", "", *pair) for pair in zip(parts, labels, strict=True)]])
    del batch["names"]
    return batch


@settings(max_examples=200)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 64))
def test_a_split_micro_batch_is_the_same_examples(lengths, parts):
    batch = batch_of(lengths)
    pieces = split(batch, parts)
    assert 1 <= len(pieces) <= len(lengths)
    for key in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([piece[key] for piece in pieces], 1), batch[key])
    assert [n for piece in pieces for n in piece["example_lengths"]] == lengths
    assert all(piece["input_ids"].shape[1] == sum(piece["example_lengths"]) for piece in pieces)
    for piece in pieces:
        assert torch.equal(piece["labelled"], (piece["labels"][0] != IGNORE).nonzero()[:, 0])
    if parts >= len(lengths):
        assert len(pieces) == len(lengths)


class SmallMemory(torch.autograd.Function):
    """Breaks off a backward pass, as a card does, where more than `most` tokens are in it."""

    @staticmethod
    def forward(ctx, value, tokens, most, error):
        ctx.error = error if tokens > most else None
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        if ctx.error:
            raise ctx.error
        return upstream, None, None, None


TORCHS = torch.OutOfMemoryError("no memory left on this simulated card")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def linear_loss(first, second, most, error=TORCHS):
    def loss_of(part):
        values = part["input_ids"].flatten().float()
        # The gradient of `second` is there before that of `first` breaks off.
        hidden = SmallMemory.apply(values * first, len(values), most, error)
        return (hidden * second).pow(2).sum()

    return loss_of


@pytest.mark.parametrize("error", [TORCHS, CUBLAS], ids=["torch", "cuBLAS"])
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(error):
    first, second = (torch.nn.Parameter(torch.tensor(v)) for v in (0.5, 2.0))
    batch = batch_of([5, 9, 3, 7, 8, 2])
    roomy = Gradients([first, second], pytest.fail)
    loss_whole, whole = roomy.compute(linear_loss(first, second, 1000), batch, scale=8.0)
    said = []
    small = Gradients([first, second], said.append)
    loss_parts, parts = small.compute(linear_loss(first, second, 10, error), batch, scale=8.0)
    assert loss_parts.item() == pytest.approx(loss_whole.item())
    assert [g.item() for g in parts] == pytest.approx([g.item() for g in whole])
    assert (first.grad, second.grad) == (None, None)
    assert small.parts > 1
    assert "effective batch stays the same" in said[-1]
    # What is handed over has just these gradients.
    small.as_loss(parts).backward()
    assert [first.grad.item(), second.grad.item()] == pytest.approx([g.item() for g in whole])


def test_another_fault_of_the_card_is_not_taken_for_a_lack_of_memory():
    first, second = (torch.nn.Parameter(torch.tensor(v)) for v in (0.5, 2.0))
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    small = Gradients([first, second], pytest.fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        small.compute(linear_loss(first, second, 10, fault), batch_of([4, 30, 2]), scale=1.0)


def test_an_example_that_does_not_fit_alone_ends_in_one_line():
    first, second = (torch.nn.Parameter(torch.tensor(v)) for v in (0.5, 2.0))
    small = Gradients([first, second], lambda line: None)
    with pytest.raises(InputError, match="one example of 30 tokens"):
        small.compute(linear_loss(first, second, 10), batch_of([4, 30, 2]), scale=1.0)
