"""What looks at a model before and during training changes nothing of its gradients."""

import bitsandbytes
import pytest
import torch

from llama_lora.check_machine import probe
from llama_lora.eval.token_losses import packing
from llama_lora.hardware.device import QUANTIZATIONS
from llama_lora.train.compute import chunked_loss
from llama_lora.train.data.packing import check_isolation
from llama_lora.train.memory import gradient_checkpointing
from tests.train.adapted import adapted_llama, batch, trainable

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
    kinds = [{}, {"intermediate_size": 72, "attention_bias": True}]
    kinds += [{"use_dora": True}] * (quantization != "8bit")  # which a CPU has not
    for kind in kinds:
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
def test_eight_bits_answer_as_they_train(dtype, tmp_path, monkeypatch):
    """Also with the products of a CPU without AVX512, whose sums are too large for fp16."""
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.float() @ b.float()).to(torch.int32))
    model = adapted_llama(tmp_path, "8bit", dtype, hidden_size=256, intermediate_size=512)
    logits = {}
    for training in (True, False):
        with autocast(dtype), torch.no_grad():
            logits[training] = model.train(training)(batch(50)["input_ids"]).logits.float()
    assert (logits[True] - logits[False]).norm() < 0.02 * logits[True].norm()


@pytest.mark.parametrize("quantization", PRECISIONS)
def test_the_probe_goes_trainings_own_way(quantization, monkeypatch):
    """It tells where weights that were packed for answering are trained through."""
    assert probe.base_error(quantization, torch.float32, "cpu") < probe.TOLERANCES[quantization]
    monkeypatch.setattr(probe, "keep_nf4_layout", lambda model: None)
    if quantization == "4bit":
        with pytest.raises((probe.WrongResult, RuntimeError)):
            probe.base_error(quantization, torch.float32, "cpu")
