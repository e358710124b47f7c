"""Adapters that answer: in which dtype their matrices are, and that nothing is cast for them."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from benchmarks.operators import Counted
from llama_lora.chat.adapters import BASE, load_adapters
from llama_lora.hardware.device import DTYPE_SWITCH, dtype_name
from llama_lora.model import adapter
from llama_lora.model.base import load_base
from tests.conftest import ROOT, error_line, run_here
from tests.weights.merging import TARGETS, logits, make_adapter

HALVES = torch.bfloat16, torch.float16
PRECISIONS = "none", "8bit", "4bit"


@pytest.fixture(params=HALVES, ids=dtype_name)
def dtype(request, monkeypatch):
    monkeypatch.setenv(DTYPE_SWITCH, dtype_name(request.param))
    return request.param


def matrices(model) -> dict:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("quantization", PRECISIONS)
def test_matrices_are_in_the_dtype_of_the_base(random_base, random_lora, dtype, quantization):
    folders = {"one": random_lora, "two": random_lora}
    model = load_adapters(random_base, folders, quantization)[0].model
    found = matrices(model)
    assert len(found) == len(folders) * 2 * len(TARGETS) * model.config.num_hidden_layers
    assert {matrix.dtype for matrix in found.values()} == {model.dtype} == {dtype}


@pytest.mark.parametrize("quantization", PRECISIONS)
def test_nothing_is_cast_for_the_products_of_an_adapter(
    random_base, random_lora, dtype, quantization
):
    def casts(model) -> int:
        with torch.inference_mode(), Counted() as counted:
            model(torch.tensor([[5]]))
        return counted.names["aten::_to_copy"]

    adapters, _ = load_adapters(random_base, {"one": random_lora, "two": random_lora}, quantization)
    found = {}
    for name in adapters.names:
        adapters.use(name)
        found[name] = casts(adapters.model)
    assert found["one"] == found["two"] == found[BASE]
    # As peft loads it, the input of each product and its result are cast.
    loaded = PeftModel.from_pretrained(load_base(random_base, quantization), random_lora).eval()
    assert casts(loaded) >= found[BASE] + 2 * len(TARGETS) * loaded.config.num_hidden_layers


@pytest.mark.parametrize("quantization", PRECISIONS)
def test_answers_are_those_of_the_adapter_in_fp32(random_base, random_lora, dtype, quantization):
    """Within what the dtype rounds, while the adapter changes the scores by far more."""
    adapters, _ = load_adapters(random_base, {"one": random_lora}, quantization)
    found = logits(adapters.model).float()
    for matrix in matrices(adapters.model).values():
        matrix.data = matrix.data.float()
    expected = logits(adapters.model).float()
    adapters.use(BASE)
    change = logits(adapters.model).float() - expected

    error = (found - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps
    assert change.norm() / expected.norm() > 0.1


@pytest.mark.parametrize("quantization", PRECISIONS)
def test_dora_stays_in_fp32(tmp_path, random_base, dtype, quantization):
    folder = make_adapter(tmp_path, random_base, use_dora=True)
    model = load_adapters(random_base, {"dora": folder}, quantization)[0].model
    found = matrices(model)
    assert sum("lora_magnitude_vector" in name for name in found) == len(found) / 3
    assert {matrix.dtype for matrix in found.values()} == {torch.float32}


def test_matrices_that_are_trained_are_in_fp32(random_base, dtype):
    base = load_base(random_base)
    trained = adapter.attach(base, r=4, alpha=8, dropout=0, target_modules=TARGETS)
    assert trained.dtype == dtype
    assert {matrix.dtype for matrix in matrices(trained).values()} == {torch.float32}


def test_an_adapter_that_overflows_is_one_line(tmp_path, random_base, random_lora, monkeypatch):
    for file in random_lora.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(random_lora / adapter.WEIGHTS)
    name = next(name for name in weights if "lora_B" in name)
    weights[name][0, 0] = -1e5
    save_file(weights, tmp_path / adapter.WEIGHTS)
    asked = ("--base_model", random_base, "--lora_weights", tmp_path, "--prompt", "Who are you?")
    for quantization in PRECISIONS:
        monkeypatch.setenv(DTYPE_SWITCH, "float16")
        line = error_line(run_here(ROOT / "generate.py", *asked, "--quantization", quantization))
        assert line == (
            f"error: {tmp_path}: {name} holds 100000, which overflows in float16; "
            "LLAMA_LORA_DTYPE=float32 computes with it"
        )
    monkeypatch.setenv(DTYPE_SWITCH, "float32")
    done = run_here(ROOT / "generate.py", *asked, "--max_new_tokens", 2)
    assert done.returncode == 0, done.stderr
