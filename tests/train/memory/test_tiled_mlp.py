"""MLPs that take a tile of the tokens at a time compute what whole ones do, in less memory."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llama_lora.train.memory import gradient_checkpointing, tiled_mlp
from tests.train.adapted import adapted_llama, layers_of, step, trainable


def close(found, expected):
    """Equal but for the rounding of sums in another order."""
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6 * max(1.0, b.abs().max().item()))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_loss_and_gradients_are_those_of_whole_mlps(tmp_path, quantization, checkpointed):
    model = adapted_llama(tmp_path, quantization)
    base, layers = model.get_base_model(), layers_of(model)
    base.enable_input_require_grads()
    expected_loss, expected = step(model)
    gradient_checkpointing.checkpoint(base, layers if checkpointed else [])
    for size in (7, 25, 49, 50, 1000):
        assert tiled_mlp.set_up(base, layers, size)
        loss, found = step(model)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
        assert close(found, expected)
    assert all(parameter.grad is None for parameter in trainable(model))


@pytest.mark.parametrize("kind", tiled_mlp.NORM_BEFORE_MLP)
def test_every_base_that_is_tiled_has_its_mlp_behind_that_norm(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(
        kind, num_hidden_layers=2, initializer_range=0.3, **sizes, **heads
    )
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    ids = torch.arange(50)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert tiled_mlp.set_up(model, list(model.model.layers), 7)
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)


def test_dora_and_mlps_without_trained_weights(tmp_path):
    for kinds in (
        {"use_dora": True},
        {"targets": ["q_proj", "down_proj"]},
        {"targets": ["v_proj"]},
    ):
        model = adapted_llama(tmp_path, **kinds)
        gradient_checkpointing.checkpoint(model.get_base_model(), layers_of(model))
        _, expected = step(model)
        tiled_mlp.set_up(model.get_base_model(), layers_of(model), 8)
        assert close(step(model)[1], expected)


def test_dropout_is_the_same_when_recomputed(tmp_path):
    """As peft draws it: against autograd through the same tiles, from the same seed."""
    model = adapted_llama(tmp_path, dropout=0.3, use_dora=True)
    layer = layers_of(model)[0]
    whole = [module.forward for module in (layer.post_attention_layernorm, layer.mlp)]
    parameters = [p for p in layer.mlp.parameters() if p.requires_grad]
    tiled_mlp.set_up(model.get_base_model(), [layer], 6)
    hidden = torch.randn(1, 20, 32, requires_grad=True)

    def gradients(compute):
        torch.manual_seed(5)
        result = compute(hidden)
        drawn = torch.rand(1)
        found = torch.autograd.grad(result.square().sum(), (hidden, *parameters))
        return result, drawn, found

    expected, next_drawn, by_autograd = gradients(
        lambda hidden: torch.cat([whole[1](whole[0](tile)) for tile in hidden.split(6, 1)], 1)
    )
    found, drawn, tiled = gradients(lambda h: layer.mlp(layer.post_attention_layernorm(h)))
    assert torch.equal(found, expected)
    assert torch.equal(drawn, next_drawn)
    assert close(tiled, by_autograd)


def test_a_tile_drops_what_the_whole_does(tmp_path):
    model = adapted_llama(tmp_path, dropout=0.3)
    model.get_base_model().enable_input_require_grads()
    expected_loss, expected = step(model)
    tiled_mlp.set_up(model.get_base_model(), layers_of(model), 8)
    loss, found = step(model)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert close(found, expected)


def test_dropout_is_the_same_in_checkpointed_layers(tmp_path):
    model = adapted_llama(tmp_path, dropout=0.3)
    model.get_base_model().enable_input_require_grads()
    tiled_mlp.set_up(model.get_base_model(), layers_of(model), 8)
    expected_loss, expected = step(model)
    gradient_checkpointing.checkpoint(model.get_base_model(), layers_of(model))
    loss, found = step(model)
    assert torch.equal(loss, expected_loss)
    assert all(map(torch.equal, found, expected))


def test_autocast_is_the_same_when_recomputed(tmp_path):
    model = adapted_llama(tmp_path, dtype=torch.bfloat16)
    gradient_checkpointing.checkpoint(model.get_base_model(), layers_of(model))
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        _, expected = step(model)
        tiled_mlp.set_up(model.get_base_model(), layers_of(model), 8)
        _, found = step(model)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0.05, atol=0.02 * b.abs().max().item())


def test_each_tile_is_computed_twice_and_no_more(tmp_path):
    """In the forward pass and for the backward one; the layer recomputes without its MLP."""
    model = adapted_llama(tmp_path)
    gradient_checkpointing.checkpoint(model.get_base_model(), layers_of(model))
    tiled_mlp.set_up(model.get_base_model(), layers_of(model), 10)
    widths = []
    for layer in layers_of(model):
        layer.mlp.gate_proj.register_forward_hook(lambda m, a, out: widths.append(out.shape[1]))
    step(model, tokens=35)
    assert sorted(widths) == [5] * 4 + [10] * 12


def test_less_memory_is_held_at_a_time(tmp_path):
    model = adapted_llama(tmp_path, intermediate_size=512, dropout=0.1)
    gradient_checkpointing.checkpoint(model.get_base_model(), layers_of(model))

    def peak():
        with gradient_checkpointing.LiveBytes() as live:
            step(model, tokens=256)
        return live.peak

    whole = peak()
    tiled_mlp.set_up(model.get_base_model(), layers_of(model), 32)
    assert peak() < whole / 3


def test_evaluation_is_tiled_as_well(tmp_path):
    model = adapted_llama(tmp_path).eval()
    ids = torch.arange(50)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        tiled_mlp.set_up(model.get_base_model(), layers_of(model), 8)
        widths = []
        layers_of(model)[0].mlp.gate_proj.register_forward_hook(
            lambda m, a, out: widths.append(out.shape[1])
        )
        found = model(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert max(widths) == 8
