"""The formulae for activations are what torch holds, on Llamas of several shapes."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from llama_lora.train import preparation
from llama_lora.train.memory import gradient_checkpointing, tiled_mlp
from llama_lora.train.plan import activation_memory
from llama_lora.train.plan.activation_memory import Layer
from tests.train.adapted import adapted_llama, layers_of, trainable

SHAPES = [
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    {
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 32,
    },
]
SETTINGS = [
    # quantization, dtype, dropout, targets
    ("none", torch.float32, 0.1, ["all-linear"]),
    ("none", torch.bfloat16, 0.1, ["q_proj", "v_proj", "up_proj"]),
    ("8bit", torch.bfloat16, 0.1, ["all-linear"]),
    ("8bit", torch.float32, 0.0, ["all-linear"]),
    ("4bit", torch.bfloat16, 0.0, ["all-linear"]),
    ("4bit", torch.float32, 0.1, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ("4bit", torch.bfloat16, 0.1, ["o_proj", "down_proj"]),
    ("none", torch.bfloat16, 0.0, ["gate_proj", "k_proj"]),
]
R = 4
POSITION = 8  # bytes


def config_of(shape: dict) -> LlamaConfig:
    return LlamaConfig(**shape)


def built(folder, layers, setting, shape, use_dora=False):
    """As under DeepSpeed, whose LoRA matrices are of the compute dtype, too."""
    quantization, dtype, dropout, targets = setting
    more = {"num_hidden_layers": layers, **shape}
    model = adapted_llama(folder, quantization, dtype, targets, R, dropout, use_dora, **more)
    for parameter in trainable(model):
        parameter.data = parameter.data.to(dtype)
    model.get_base_model().enable_input_require_grads()
    return model


def conversation(tokens: int) -> dict:
    """A single one, whose attention is computed all at once."""
    ids = torch.arange(tokens)[None] % 61
    return {"input_ids": ids, "labels": ids}


def held(model, tokens) -> int:
    """Bytes that wait for the backward pass."""
    with gradient_checkpointing.LiveBytes() as live:
        loss = model(**conversation(tokens)).loss
        kept = live.bytes
    del loss
    return kept


def peak(model, tokens) -> int:
    with gradient_checkpointing.LiveBytes() as live:
        torch.autograd.grad(model(**conversation(tokens)).loss, trainable(model))
    return live.peak


def per_token(measure, model, tokens: int = 480) -> float:
    """What grows with the tokens; of a peak only where they outweigh what does not.

    In steps of `packed_attention.STEP`, so that nothing is filled up.
    """
    measure(model, 32)  # what is made once
    return (measure(model, 2 * tokens) - measure(model, tokens)) / tokens


def layer_of(setting, shape, **more) -> Layer:
    _, dtype, dropout, targets = setting
    return Layer.of(config_of(shape), targets, R, dtype.itemsize, dropout, False, **more)


EVERY = [(setting, shape) for setting in SETTINGS for shape in SHAPES]
SOME = [(SETTINGS[number], SHAPES[number % 3]) for number in (0, 3, 5, 7)]
REST = [pytest.param(*pair, marks=pytest.mark.slow) for pair in EVERY if pair not in SOME]
every_kind = pytest.mark.parametrize(("setting", "shape"), SOME + REST, ids=str)


@every_kind
def test_what_waits_for_the_backward_pass(tmp_path, setting, shape):
    itemsize = setting[1].itemsize
    two, three = (built(tmp_path / str(n), n, setting, shape) for n in (2, 3))
    masks = activation_memory.masks_per_token(setting[3], setting[2])
    expected = layer_of(setting, shape).kept() + masks
    found = per_token(held, two, 64)
    assert per_token(held, three, 64) - found == expected
    ends = (
        activation_memory.ends_per_token(config_of(shape), itemsize) - activation_memory.IDS
    )  # which the test made
    assert found == 2 * expected + ends
    for model in (two, three):
        gradient_checkpointing.checkpoint(model.get_base_model(), layers_of(model))
    found = per_token(held, three, 64) - per_token(held, two, 64)
    assert found == masks + activation_memory.checkpoint_per_token(config_of(shape), itemsize)


@every_kind
def test_the_peak_while_a_layer_recomputes(tmp_path, setting, shape):
    itemsize = setting[1].itemsize
    model = built(tmp_path, 3, setting, shape)
    base, layers = model.get_base_model(), layers_of(model)
    gradient_checkpointing.checkpoint(base, layers)
    of_layer = activation_memory.checkpoint_per_token(config_of(shape), itemsize)
    of_layer += activation_memory.masks_per_token(setting[3], setting[2])
    outside = 3 * of_layer + POSITION
    outside += (
        activation_memory.beside_layers_per_token(config_of(shape), itemsize)
        - activation_memory.IDS
    )
    for count in (1, 3):

        def measure(model, tokens, count=count):
            tiled_mlp.set_up(base, layers, -(-tokens // count))
            return peak(model, tokens)

        of_layer = layer_of(setting, shape).peak(count)
        assert per_token(measure, model) == pytest.approx(outside + of_layer, rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_dora_keeps_besides(tmp_path, dropout):
    shape, targets = SHAPES[1], {"gate_proj": (192, 64), "down_proj": (64, 192)}

    def found(quantization, use_dora):
        """Bytes per token, and bytes whatever the tokens."""
        setting = quantization, torch.bfloat16, dropout, targets
        model = built(tmp_path / f"{quantization}-{use_dora}", 1, setting, shape, use_dora)
        slope = per_token(held, model, 64)
        return slope, held(model, 64) - 64 * slope

    without, frozen = found("4bit", False), found("4bit", True)
    setting = "4bit", torch.bfloat16, dropout, targets
    expected = layer_of(setting, shape, dora=True).kept()
    expected += activation_memory.dora_per_token(targets, 2)
    ends = activation_memory.ends_per_token(config_of(shape), 2) - activation_memory.IDS
    assert frozen[0] == expected + ends
    weights = activation_memory.dora_weights(targets, "4bit", 2, dropout)
    assert weights == (2 * 2 * 64 * 192 if dropout else 0)
    scales = 4 * 4 * sum(outputs for outputs, _ in targets.values())
    assert 0 <= frozen[1] - without[1] - weights <= scales


def test_dora_is_measured_a_layer_at_a_time(tmp_path):
    """With dropout it keeps unfolded weights, which no number of tokens makes more."""
    shape, targets = SHAPES[1], {"gate_proj": (192, 64), "down_proj": (64, 192)}
    setting = "4bit", torch.bfloat16, 0.1, targets
    model = built(tmp_path, 3, setting, shape, use_dora=True)
    per_token, fixed = gradient_checkpointing.layer_bytes(model.get_base_model(), layers_of(model))
    expected = layer_of(setting, shape, dora=True).kept()
    expected += activation_memory.dora_per_token(targets, 2)
    expected -= activation_memory.checkpoint_per_token(config_of(shape), 2)
    assert per_token == pytest.approx(expected, rel=0.05)
    weights = activation_memory.dora_weights(targets, "4bit", 2, 0.1)
    assert weights <= fixed <= 1.2 * weights


def test_what_the_first_step_allocates_and_keeps_is_left_free(tmp_path, monkeypatch):
    model = built(tmp_path, 3, SETTINGS[1], SHAPES[0]).get_base_model()
    monkeypatch.setattr(gradient_checkpointing, "free_memory", lambda: 10_000_000)

    def layers(reserved):
        return gradient_checkpointing.set_up(model, "auto", 100, reserved=reserved)

    assert "checkpointing in 0 of 3 layers" in layers(0)
    assert "checkpointing in 3 of 3 layers" in layers(10_000_000)


@pytest.mark.parametrize(("optim", "states"), [("adamw_torch", 8), ("paged_adamw_8bit", 2)])
def test_what_the_first_step_allocates(tmp_path, monkeypatch, optim, states):
    """Gradients twice in fp32, and the optimizer's states."""
    model, given = built(tmp_path, 1, SETTINGS[0], SHAPES[0]), []
    monkeypatch.setattr(
        gradient_checkpointing, "set_up", lambda *values: given.append(values[-1]) or ""
    )
    args = SimpleNamespace(
        optim=optim,
        compute_dtype=torch.float32,
        world_size=1,
        recompute="auto",
        offload_activations="auto",
        mlp_tiles="auto",
        process_index=0,
    )
    callback = preparation.Preparation(100, nullcontext)
    callback.on_train_begin(args, SimpleNamespace(is_world_process_zero=False), None, model)
    assert given == [(8 + states) * sum(one.numel() for one in trainable(model))]
