"""What looks at a model before and during training changes nothing of its gradients."""

import bitsandbytes
import numpy as np
import pytest
import torch
from transformers import DynamicCache

from llama_lora.check_machine import probe
from llama_lora.eval.token_losses import packing
from llama_lora.hardware.device import QUANTIZATIONS
from llama_lora.train.compute import chunked_loss
from llama_lora.train.data.example import Example
from llama_lora.train.data.packing import check_isolation, collate
from llama_lora.train.memory import gradient_checkpointing, tiled_mlp
from llama_lora.train.memory.out_of_memory import split
from tests.train.adapted import adapted_llama, batch, layers_of, trainable

PRECISIONS = [name for name in QUANTIZATIONS if name != "auto"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("avx512_bf16")


def autocast(dtype):
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def gradients(model, dtype, seed: int = 1) -> list[torch.Tensor]:
    """Of a micro-batch, as training computes them."""
    torch.manual_seed(seed)
    with autocast(dtype):
        value = model.train()(**batch(50)).loss
    return torch.autograd.grad(value, trainable(model))


def evaluated(model):
    """A held-out loss, as the trainer measures it."""
    model.eval()
    model(**batch(50), num_items_in_batch=1)


LOOKS = {
    "isolation": check_isolation,
    "loss": lambda model: chunked_loss.check(model.get_base_model()),
    "checkpointing": lambda model: gradient_checkpointing.set_up(
        model.get_base_model(), "auto", 100
    ),
    "evaluation": torch.no_grad()(evaluated),
    "evaluate.py": lambda model: packing(model.get_base_model()).__enter__(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", PRECISIONS)
def test_no_look_at_a_model_changes_its_gradients(quantization, dtype, tmp_path):
    """In widths that bitsandbytes' kernel takes, and in one that is no multiple of 32; DoRA."""
    for kind in ({}, {"intermediate_size": 72, "attention_bias": True}, {"use_dora": True}):
        model = adapted_llama(tmp_path, quantization, dtype, **kind)
        before = gradients(model, dtype)
        assert all(gradient.any() for gradient in before)
        for name, look in LOOKS.items():
            with autocast(dtype):
                look(model)
            after = gradients(model, dtype)
            assert all(map(torch.equal, before, after)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", PRECISIONS)
def test_gradients_over_a_quantized_base_are_those_over_what_it_keeps(
    quantization, dtype, tmp_path
):
    """The oracle is an unquantized layer with the weights that quantizing leaves."""
    model = adapted_llama(tmp_path, quantization, dtype)
    with autocast(dtype):
        check_isolation(model)
        found = gradients(model, dtype)
    with torch.no_grad():
        unfold(model, dtype)
    expected = gradients(model, dtype)
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert error < 8 * torch.finfo(dtype).eps


def unfold(model, dtype) -> None:
    """Put plain linear layers in the place of quantized ones, with the weights that these keep."""
    from peft.utils.integrations import dequantize_module_weight

    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
                weight = dequantize_module_weight(layer).to(dtype)
                plain = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=dtype)
                plain.weight = torch.nn.Parameter(weight, requires_grad=False)
                setattr(module, name, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eight_bits_answer_as_they_train(dtype, tmp_path):
    """A prompt bit for bit, and token by token within the rounding of the dtype."""
    model = adapted_llama(tmp_path, "8bit", dtype, hidden_size=256, intermediate_size=512)
    ids = batch(50)["input_ids"]
    with autocast(dtype):
        trained = model(ids).logits.detach()
        with torch.no_grad():
            assert torch.equal(model.eval()(ids).logits, trained)
            model.get_base_model().set_attn_implementation("sdpa")
            cache = DynamicCache()
            steps = [model(ids[:, [n]], past_key_values=cache).logits for n in range(50)]
    error = (torch.cat(steps, 1).float() - trained.float()).norm() / trained.float().norm()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", PRECISIONS)
def test_what_shares_a_micro_batch_changes_no_gradient(quantization, dtype, tmp_path):
    """Of 20 examples at once, in any parts and tiles, and each by itself."""
    model = adapted_llama(tmp_path, quantization, dtype, hidden_size=256, intermediate_size=512)
    random = np.random.default_rng(0)
    lengths = random.integers(5, 40, 20)
    rows = [random.integers(1, 60, length) for length in lengths]
    whole = collate([[Example(str(n), "", row, row) for n, row in enumerate(rows)]])
    del whole["names"]

    def gradients(parts: int) -> list[torch.Tensor]:
        total = None
        for part in split(whole, parts):
            with autocast(dtype):
                loss = model(**part, num_items_in_batch=lengths.sum()).loss
            new = [one.float() for one in torch.autograd.grad(loss, trainable(model))]
            total = new if total is None else list(map(torch.add, total, new))
        return total

    expected = gradients(len(rows))
    rounding = max(1e-5, 8 * torch.finfo(dtype).eps)
    for parts, tile in ((1, None), (3, None), (1, 64)):
        if tile:
            gradient_checkpointing.checkpoint(model.get_base_model(), layers_of(model))
            tiled_mlp.set_up(model.get_base_model(), layers_of(model), tile)
        for ours, theirs in zip(gradients(parts), expected, strict=True):
            assert (ours - theirs).norm() < rounding * theirs.norm()


@pytest.mark.parametrize("quantization", PRECISIONS)
def test_the_probe_goes_trainings_own_way(quantization, monkeypatch):
    """It tells where weights that were packed for answering are trained through."""
    assert probe.base_error(quantization, torch.float32, "cpu") < probe.TOLERANCES[quantization]
    monkeypatch.setattr(probe, "keep_nf4_layout", lambda model: None)
    if quantization == "4bit":
        with pytest.raises((probe.WrongResult, RuntimeError)):
            probe.base_error(quantization, torch.float32, "cpu")
