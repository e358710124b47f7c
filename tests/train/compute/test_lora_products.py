"""Adapted layers compute what peft's own forward pass does, and what is not plain stays peft's."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from llama_lora.train.compute import lora_layers
from llama_lora.train.compute.lora_layers import SharedInput
from llama_lora.train.compute.lora_products import Products
from tests.train.adapted import adapted_llama, batch, layers_of, step, trainable


def adapted_layers(model) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


class Given(torch.nn.Module):
    """Dropout as peft applies it, with the mask that an adapted layer draws."""

    def __init__(self, shared: SharedInput):
        super().__init__()
        self.shared = shared

    def forward(self, x):
        dropout = self.shared.dropout
        mask = dropout.rows(dropout.begins(self.shared.number), x.shape[-1])
        return x * mask.view_as(x) / (1 - dropout.share)


def as_peft(model):
    """The same model with peft's own forward passes, and MLPs, norms and angles of transformers."""
    for layer in adapted_layers(model):
        shared = layer.forward.func.__self__ if "forward" in vars(layer) else None
        if shared and shared.dropout.share:
            layer.lora_dropout["default"] = Given(shared)
    for module in model.get_base_model().model.modules():
        vars(module).pop("forward", None)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("targets", [["all-linear"], ["k_proj", "v_proj", "o_proj", "up_proj"]])
def test_values_and_gradients_are_pefts(tmp_path, quantization, dropout, targets):
    model = adapted_llama(tmp_path, quantization, targets=targets, dropout=dropout)
    loss, found = step(model)
    expected_loss, expected = step(as_peft(model))
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * max(1, b.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_they_are_no_further_from_exact_ones_than_pefts(tmp_path, dtype):
    """Under autocast, from matrices in fp32; in the mean over all of them."""
    model, exact = (
        adapted_llama(tmp_path / str(n), dtype=one, dropout=0.3, hidden_size=128)
        for n, one in enumerate((dtype, torch.float32))
    )
    exact.load_state_dict(model.state_dict())

    def gradients(model):
        with torch.autocast("cpu", dtype, enabled=model is not exact):
            loss = model(**batch(200)).loss
        return torch.autograd.grad(loss, trainable(model))

    def error(model):
        pairs = zip(gradients(model), expected, strict=True)
        return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).mean()

    expected = gradients(as_peft(exact))
    ours = error(model)
    assert ours < error(as_peft(model))
    assert ours < 0.1


def test_layers_that_share_an_input_are_computed_at_once(tmp_path, monkeypatch):
    model = adapted_llama(tmp_path)
    calls = []
    whole = Products.forward

    def forward(ctx, x, layers, *others):
        calls.append(len(layers))
        return whole(ctx, x, layers, *others)

    monkeypatch.setattr(Products, "forward", forward)
    step(model)
    assert calls == [3, 1, 2] * len(layers_of(model))  # q k v, o, gate up; down has its MLP
    attention = layers_of(model)[0].self_attn
    hidden = torch.randn(1, 7, 32)
    query = attention.q_proj(hidden)
    key = attention.k_proj(hidden + 1)  # not the input that the results wait for
    value = attention.v_proj(hidden)
    as_peft(model)
    assert torch.allclose(query, attention.q_proj(hidden), atol=1e-5)
    assert torch.allclose(key, attention.k_proj(hidden + 1), atol=1e-5)
    assert torch.allclose(value, attention.v_proj(hidden), atol=1e-5)


def test_a_layer_that_gets_some_of_the_tokens_drops_as_peft_does(tmp_path):
    """As an expert; a mask has a row for each token of the micro-batch."""
    model = adapted_llama(tmp_path, dropout=0.3)
    step(model)
    mlp, hidden = layers_of(model)[0].mlp, torch.randn(1, 7, 32)
    assert lora_layers.arguments_of(mlp.down_proj, torch.randn(1, 50, 64)) is not None
    torch.manual_seed(3)
    found = mlp(hidden)
    as_peft(model)
    for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        layer.lora_dropout["default"] = torch.nn.Dropout(0.3)
    torch.manual_seed(3)
    torch.testing.assert_close(found, mlp(hidden))


def test_an_error_between_two_layers_leaves_nothing_behind(tmp_path):
    model = adapted_llama(tmp_path)
    attention = layers_of(model)[1].self_attn
    whole, attention.k_proj.forward = attention.k_proj.forward, None
    with pytest.raises(TypeError):
        step(model)
    attention.k_proj.forward = whole
    shared = whole.func.__self__
    assert shared.waiting
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(3)[None])
    assert shared.given is None
    assert not shared.waiting


def test_two_adapters_and_switched_off_ones_are_pefts(tmp_path):
    model = adapted_llama(tmp_path)
    plain = model.get_base_model()
    ids = batch(30)["input_ids"]
    with torch.no_grad():
        with model.disable_adapter():
            off = plain(input_ids=ids).logits
        one = plain(input_ids=ids).logits
        assert not torch.allclose(one, off, atol=1e-3)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
        both = plain(input_ids=ids).logits
        assert not torch.allclose(both, one, atol=1e-3)
        expected = as_peft(model).get_base_model()
        assert torch.allclose(expected(input_ids=ids).logits, both, atol=1e-5)
        with model.disable_adapter():
            assert torch.allclose(expected(input_ids=ids).logits, off, atol=1e-5)


def test_dora_and_unknown_weights_keep_pefts_forward_pass(tmp_path):
    dora = adapted_llama(tmp_path / "dora", use_dora=True)
    assert not any(map(lora_layers.adapted, adapted_layers(dora)))
    assert not any("forward" in vars(layer) for layer in adapted_layers(dora))

    class OfAnotherKind(torch.nn.Linear):
        pass

    model = adapted_llama(tmp_path / "other")
    layer = layers_of(model)[0].mlp.down_proj
    layer.base_layer.__class__ = OfAnotherKind
    assert lora_layers.adapted(layer) is None
    _, found = step(model)
    for a, b in zip(found, step(as_peft(model))[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * max(1, b.abs().max().item()))


def test_little_is_kept(tmp_path):
    """Of an adapted layer's input one copy, whatever shares it, and no mask."""
    from llama_lora.train.memory.gradient_checkpointing import LiveBytes

    def kept(model):
        with LiveBytes() as live:
            loss = model(**batch(64)).loss
            held = live.bytes
        del loss
        return held

    model = adapted_llama(tmp_path, dtype=torch.bfloat16, dropout=0.1)
    ours = kept(model)
    assert ours < 0.5 * kept(as_peft(model))
