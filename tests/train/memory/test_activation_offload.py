"""What waits in the host's memory comes back as it was, whatever happens in between."""

from types import SimpleNamespace

import pytest
import torch

from llama_lora.cli import InputError
from llama_lora.hardware.cards import GIB
from llama_lora.train.memory import activation_offload, gradient_checkpointing
from llama_lora.train.memory.activation_offload import ON_THE_WAY, Offload
from llama_lora.train.memory.out_of_memory import Gradients
from tests.train.adapted import adapted_llama, batch, layers_of, step, trainable

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that the tensors of a tiny model leave, each in several blocks."""
    monkeypatch.setattr(activation_offload, "LEAST", 64)
    monkeypatch.setattr(activation_offload, "BLOCK", 1000)


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_gradients_are_bit_for_bit_those_without_it(tmp_path, quantization):
    model = adapted_llama(tmp_path, quantization, dropout=0.1, num_hidden_layers=4)
    base = model.get_base_model()
    gradient_checkpointing.checkpoint(base, layers_of(model))
    expected_loss, expected = step(model)
    moved = Offload(CPU)
    gradient_checkpointing.checkpoint(base, layers_of(model), moved)
    for count in (4, 8):  # the second time in blocks that were used before
        loss, found = step(model)
        assert torch.equal(loss, expected_loss)
        assert all(map(torch.equal, found, expected))
        assert moved.count == count  # a layer's input, and nothing else
    assert len(moved.waiting) <= ON_THE_WAY


def test_few_inputs_are_on_the_card_at_a_time(tmp_path):
    model = adapted_llama(tmp_path, num_hidden_layers=8)
    moved, seen = Offload(CPU), []

    def look(*_):
        seen.append(sum(packed.on_card is not None for packed in moved.waiting.values()))

    gradient_checkpointing.checkpoint(model.get_base_model(), layers_of(model), moved)
    for layer in layers_of(model):
        layer.self_attn.register_forward_hook(look)
    step(model)
    assert len(seen) == 16  # forward, and recomputed
    assert max(seen) <= ON_THE_WAY


class Break(torch.autograd.Function):
    """Runs out of memory in the backward pass where more than `most` tokens are in it."""

    @staticmethod
    def forward(ctx, hidden, most):
        ctx.full = hidden.shape[1] > most
        return hidden.clone()

    @staticmethod
    def backward(ctx, upstream):
        if ctx.full:
            raise torch.OutOfMemoryError("no memory left on this simulated card")
        return upstream, None


def test_running_out_of_memory_halfway_leaves_no_trace(tmp_path):
    model = adapted_llama(tmp_path, num_hidden_layers=6)
    moved = Offload(CPU)
    gradient_checkpointing.checkpoint(model.get_base_model(), layers_of(model), moved)

    def gradients(most):
        hook = layers_of(model)[2].register_forward_hook(lambda m, a, out: Break.apply(out, most))
        computing = Gradients(trainable(model), lambda line: None)
        found = computing.compute(lambda part: 0 + model(**part).loss, batch(50), 4.0)
        hook.remove()
        return computing.parts, found

    gradients(most=1000)
    blocks = len(moved.host.free) + sum(len(one.blocks) for one in moved.waiting.values())
    parts, (_, found) = gradients(most=40)
    assert parts == 2
    for first, second in zip(found, gradients(most=40)[1][1], strict=True):
        assert torch.equal(first, second)
    left = len(moved.host.free) + sum(len(one.blocks) for one in moved.waiting.values())
    assert left == blocks  # nothing was lost, and no more was needed than the first time
    assert len(moved.waiting) <= ON_THE_WAY


def test_what_is_small_strided_or_a_weight_stays():
    weight = torch.nn.Parameter(torch.randn(20, 20))
    values = torch.randn(20, 20, requires_grad=True)
    moved = Offload(CPU)
    with moved:
        small = values[:2, :3].exp().sin()
        strided = values.exp().t().sin()
        assert moved.count == 1  # what exp() gave, for its own gradient
        product = values * weight  # each is kept for the gradient of the other
        assert moved.count == 2
    found = torch.autograd.grad((small.sum() + strided.sum() + product.sum()), (values, weight))
    expected = weight.detach() + values.exp() * values.exp().cos()
    expected[:2, :3] += values[:2, :3].exp() * values[:2, :3].exp().cos()
    assert torch.allclose(found[0], expected.detach(), atol=1e-5)
    assert torch.equal(found[1], values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_views_of_one_tensor_come_back_as_they_were(dtype):
    start = torch.randn(60, 30, dtype=dtype)

    def gradient(context):
        values = start.clone().requires_grad_()
        with context:
            part, all_of_it = values[11:50], values.view(30, 60)
            result = (part.exp() * part.sin()).sum() + (all_of_it * all_of_it.cos()).sum()
        again = torch.autograd.grad(result, values, retain_graph=True)[0]
        found = torch.autograd.grad(result, values)[0]
        assert torch.equal(found, again)
        return found

    plain = gradient(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
    assert torch.equal(gradient(Offload(CPU)), plain)


# As deepspeed's launcher and torchrun tell each of two processes on a machine.
TWO = {"LOCAL_SIZE": "2"}, {"LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("free", "processes", "fits"),
    [(20, {}, True), (16, {}, False), *((40, two, True) for two in TWO)]
    + [(30, two, False) for two in TWO],
)
def test_no_more_than_a_share_of_the_hosts_free_memory_is_pinned(
    free, processes, fits, monkeypatch
):
    """The inputs of 32 layers at 7B and 40,000 tokens: 10 GiB in blocks."""
    monkeypatch.setattr(activation_offload, "LEAST", 1 << 20)
    monkeypatch.setattr(activation_offload, "BLOCK", 16 << 20)
    monkeypatch.setattr(gradient_checkpointing, "host_memory", lambda: free * GIB)
    monkeypatch.setattr(gradient_checkpointing, "Offload", lambda device: "offloads")
    for name, number in processes.items():
        monkeypatch.setenv(name, number)
    model = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.float16, config=SimpleNamespace(hidden_size=4096)
    )

    def offload(wanted: str):
        return gradient_checkpointing._offload(model, 32, 40_000, wanted, crowded=True)

    if fits:
        assert (offload("auto"), offload("True")) == ("offloads", "offloads")
        return
    assert offload("auto") is None
    most = 0.6 * free / (2 if processes else 1)
    with pytest.raises(InputError, match=rf"needs 10.0 GiB of pinned.* at most {most:.1f} GiB"):
        offload("True")
