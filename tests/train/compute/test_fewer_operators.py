"""Norms, MLPs and rotary embeddings: what is replaced is the same, and what differs stays."""

import importlib
from functools import partial

import pytest
import torch
from transformers.models.glm import modeling_glm
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

from llama_lora.train.compute import gated_mlp, rms_norm, rotary_embedding
from tests.train.compute import bases

EPS = 1e-5


def norm(size: int, dtype) -> LlamaRMSNorm:
    made = LlamaRMSNorm(size, EPS)
    made.weight.data.uniform_(0.5, 1.5)
    return made.to(dtype).requires_grad_(False)


def value_and_gradient(function, x, upstream):
    x = x.detach().requires_grad_()
    value = function(x)
    return value.detach(), torch.autograd.grad(value, x, upstream.to(value.dtype))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_norm_is_no_further_from_exact_values_than_the_eager_one(dtype):
    module = norm(96, dtype)
    for scale in (1.0, 1e-3, 30.0):
        x = (torch.randn(2, 50, 96) * scale).to(dtype)
        upstream = torch.randn(2, 50, 96).to(dtype)
        exact = value_and_gradient(module.double(), x.double(), upstream.double())
        module.to(dtype)
        eager = value_and_gradient(module, x, upstream)
        ours = value_and_gradient(lambda x: rms_norm.rms_norm(x, module.weight, EPS), x, upstream)
        for mine, theirs, truth in zip(ours, eager, exact, strict=True):
            assert mine.dtype == dtype
            size = truth.norm()
            error = (mine - truth).norm() / size
            assert error <= (1e-6 if dtype == torch.float32 else (theirs - truth).norm() / size)


def test_a_norm_keeps_its_input_and_no_copy():
    x = torch.randn(1, 50, 96).bfloat16().requires_grad_()
    kept = rms_norm.rms_norm(x, norm(96, torch.bfloat16).weight, EPS).grad_fn.saved_tensors
    assert kept[0].data_ptr() == x.data_ptr()
    assert sum(one.nbytes for one in kept[1:]) == 2 * 96 + 4 * 50


@pytest.mark.parametrize(
    ("kind", "norms", "mlps", "angles"),
    [
        ("llama", 5, 2, 2),
        ("mistral", 5, 2, 2),
        ("qwen2", 5, 2, 2),
        ("olmo2", 9, 2, 2),
        ("phi3", 5, 0, 2),  # gate and up are one layer
        ("gemma3", 0, 2, 2),  # a norm by 1 + weight
        ("gemma2", 0, 2, 2),
        ("stablelm", 0, 2, 2),  # LayerNorm
        ("nemotron", 0, 0, 2),  # an MLP without a gate, and angles for a part of each head
    ],
)
def test_what_is_replaced_in_a_base(kind, norms, mlps, angles):
    model = bases.model(kind, "eager").requires_grad_(False)
    ids = torch.arange(40)[None] % 90
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for part in (gated_mlp, rms_norm, rotary_embedding):
            part.set_up(model)
        found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    ours = [module for module in model.modules() if "forward" in vars(module)]
    names = [type(module).__name__ for module in ours]
    counts = [sum(name.endswith(end) for name in names) for end in ("Norm", "MLP", "Attention")]
    assert counts == [norms, mlps, angles]


def test_an_mlp_that_does_more_is_left_alone():
    class Limited(LlamaMLP):
        def forward(self, x):
            gate = self.act_fn(self.gate_proj(x)).clamp(max=0.1)
            return self.down_proj(gate * self.up_proj(x))

    model = bases.model("llama", "eager")
    for layer in model.model.layers:
        layer.mlp.__class__ = Limited
    gated_mlp.set_up(model)
    assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)


@pytest.mark.parametrize(
    ("kind", "same"),
    [
        ("llama.modeling_llama.LlamaMLP", True),
        ("gemma3.modeling_gemma3.Gemma3MLP", True),
        ("qwen3.modeling_qwen3.Qwen3MLP", True),
        ("seed_oss.modeling_seed_oss.SeedOssMLP", False),  # dropout of its own
        ("gemma3n.modeling_gemma3n.Gemma3nTextMLP", False),  # sparsity
        ("falcon_h1.modeling_falcon_h1.FalconH1MLP", False),  # factors
        ("bitnet.modeling_bitnet.BitNetMLP", False),  # a norm
        ("nemotron.modeling_nemotron.NemotronMLP", False),
    ],
)
def test_which_mlps_are_gated_and_nothing_else(kind, same):
    module, name = f"transformers.models.{kind}".rsplit(".", 1)
    assert gated_mlp._is_gated(getattr(importlib.import_module(module), name)) is same


def test_on_a_card_autocast_does_not_cast_a_norms_input(monkeypatch):
    """torch's autocast for cards has `rms_norm` among the operators that it computes in fp32."""
    seen = []

    def record(x, *others):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return x

    monkeypatch.setattr(torch.nn.functional, "rms_norm", record)
    with torch.autocast("cpu", torch.bfloat16):
        rms_norm._of_torch(torch.ones(1, 4).bfloat16(), torch.ones(4).bfloat16(), EPS)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(torch.bfloat16, False)]


@pytest.mark.parametrize("act", [torch.nn.SiLU(), torch.nn.GELU("tanh"), torch.nn.ReLU()], ids=str)
def test_a_gate_goes_backward_as_autograd_does(act):
    gate, up, upstream = torch.randn(3, 20, 8, dtype=torch.double)
    leaves = gate.requires_grad_(), up.requires_grad_()
    expected = torch.autograd.grad(act(gate) * up, leaves, upstream)
    found = torch.autograd.grad(gated_mlp.Gated.apply(gate, up, act), leaves, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_and_keys_turn_as_llamas(dtype):
    query, key = torch.randn(1, 6, 30, 16), torch.randn(1, 2, 30, 16)
    angles = torch.randn(1, 30, 8).repeat(1, 1, 2)

    def found(function, dtype):
        given = [one.to(dtype).requires_grad_() for one in (query, key)]
        results = function(*given, angles.cos().to(dtype), angles.sin().to(dtype))
        summed = sum((one.double() ** 3).sum() for one in results)
        return [*results, *torch.autograd.grad(summed, given)]

    exact = found(apply_rotary_pos_emb, torch.double)
    theirs, ours = found(apply_rotary_pos_emb, dtype), found(ours_of(apply_rotary_pos_emb), dtype)
    for mine, their, truth in zip(ours, theirs, exact, strict=True):
        assert (mine - truth).norm() <= 1.05 * (their - truth).norm() + 1e-6


def ours_of(own):
    return partial(rotary_embedding.rotated, own)


def test_pairs_of_neighbours_do_not_turn_so():
    assert rotary_embedding._is_same(apply_rotary_pos_emb, 16)
    assert not rotary_embedding._is_same(modeling_glm.apply_rotary_pos_emb, 16)
