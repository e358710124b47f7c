"""Products with 8-bit weights: bitsandbytes' codes and numbers, alike on every device."""

import threading

import bitsandbytes
import pytest
import torch
from bitsandbytes.autograd._functions import MatMul8bitFp, MatmulLtState
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llama_lora.model import int8_linear
from llama_lora.model.base import load_base
from llama_lora.train.memory.gradient_checkpointing import LiveBytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
sizes = st.integers(1, 70)


def layer(outputs: int, inputs: int, bias: bool = True, seed: int = 0) -> int8_linear.Int8Linear:
    """A layer of random weights, of which the first row is zero."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    linear.weight[0] = 0
    quantized = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False)
    quantized.load_state_dict(linear.state_dict())
    with int8_linear.quantized_alike():
        quantized.to("cpu")
    int8_linear.use_in(quantized)
    return quantized


def own_product(linear, x: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' product with the weight dequantized, as it trains on a CPU."""
    state = MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights = linear.weight.data, linear.weight.SCB, False
    return MatMul8bitFp.apply(x, linear.weight, None, linear.bias.to(x.dtype), state)


def error(found: torch.Tensor, linear, x: torch.Tensor) -> float:
    """How far it is from the product in fp64, as a share of that."""
    weight = linear.weight.data.double() * (linear.weight.SCB.double()[:, None] / 127)
    bias = 0 if linear.bias is None else linear.bias.to(x.dtype).double()
    exact = x.double() @ weight.T + bias
    return ((found.double() - exact).norm() / exact.norm()).item()


@given(outputs=sizes, inputs=sizes, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_codes_are_those_of_bitsandbytes_own_torch_kernel(outputs, inputs, seed):
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs).half()
    found = int8_linear.quantize(weight)
    expected = bitsandbytes.functional.int8_vectorwise_quant(weight.clone())
    assert all(map(torch.equal, found[:2], expected[:2]))


def test_a_row_of_zeros_has_codes_of_zero():
    codes, scales, _ = int8_linear.quantize(torch.zeros(3, 8, dtype=torch.float16))
    assert not codes.any()
    assert not scales.any()


def test_a_loaded_base_has_the_codes_that_bitsandbytes_gives(tiny_base):
    settings = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    theirs = AutoModelForCausalLM.from_pretrained(tiny_base, **settings)
    layers = [m for m in load_base(tiny_base, "8bit").modules() if is_quantized(m)]
    assert layers
    for ours, other in zip(layers, filter(is_quantized, theirs.modules()), strict=True):
        assert isinstance(ours, int8_linear.Int8Linear)
        assert torch.equal(ours.weight.data, other.weight.data)
        assert torch.equal(ours.weight.SCB, other.weight.SCB)
    assert bitsandbytes.functional.int8_vectorwise_quant is not int8_linear.quantize


def is_quantized(module) -> bool:
    return isinstance(module, bitsandbytes.nn.Linear8bitLt)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 96), (77, 33), (1100, 576)], ids=str)
def test_output_and_gradient_are_bit_for_bit_those_of_bitsandbytes(shape, dtype):
    """The largest is dequantized in several pieces."""
    linear = layer(*shape)
    given = torch.randn(2, 20, shape[1]).to(dtype)
    found, expected = [], []
    for product, kept in ((linear, found), (lambda x: own_product(linear, x), expected)):
        x = given.clone().requires_grad_()
        output = product(x)
        kept += [output.detach(), *torch.autograd.grad(output, x, torch.ones_like(output))]
    assert all(map(torch.equal, found, expected))
    with torch.no_grad():
        assert torch.equal(linear(given), expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_decides_the_dtype(dtype, bias):
    linear, x = layer(8, 16, bias), torch.randn(20, 16)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = linear(x)
    assert found.dtype == dtype
    assert torch.equal(found, linear(x.to(dtype)))


@given(outputs=sizes, inputs=sizes, rows=st.integers(1, 16), shift=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_are_as_exact_as_many(dtype, outputs, inputs, rows, shift):
    """Wherever they start in memory, and the codes too: torch's kernel reads 16 bytes at once."""
    linear = layer(outputs, inputs)
    memory = torch.zeros(outputs * inputs + shift, dtype=torch.int8)
    memory[shift:] = linear.weight.data.flatten()
    linear.weight.data = memory[shift:].view(outputs, inputs)
    x = torch.randn(rows + 1, inputs).to(dtype)[1:]
    with torch.no_grad():
        assert error(linear(x), linear, x) < 4 * torch.finfo(dtype).eps
        assert linear(x[None]).shape == (1, rows, outputs)


@pytest.mark.usefixtures("avx512_bf16")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_of_a_wide_layer(dtype):
    """In several pieces in fp32; in bf16 with torch's own kernel, which takes multiples of 16."""
    linear = layer(1040, 512, bias=False)
    x = torch.randn(3, 512).to(dtype)
    with torch.no_grad():
        assert error(linear(x), linear, x) < 2 * torch.finfo(dtype).eps


def test_nothing_is_kept_for_the_backward_pass():
    linear, x = layer(64, 96), torch.randn(50, 96, requires_grad=True)
    linear(x)  # makes the buffer
    with LiveBytes() as live:
        output = linear(x)
    assert live.bytes == output.nbytes
    assert not output.grad_fn.saved_tensors


def test_an_evaluation_leaves_nothing_that_a_training_trips_over():
    linear = layer(64, 96)
    with torch.inference_mode():
        linear(torch.randn(20, 96))
    x = torch.randn(20, 96, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 20])
def test_an_input_may_be_transposed_or_empty(rows, dtype):
    linear, x = layer(64, 96), torch.randn(96, rows).to(dtype).T
    with torch.no_grad():
        assert error(linear(x), linear, x) < 4 * torch.finfo(dtype).eps
        assert linear(x[:0]).shape == (0, 64)


def test_another_weight_has_its_own_steps():
    linear, other, x = layer(64, 96), layer(64, 96, seed=1), torch.randn(20, 96)
    linear(x)
    linear.weight, linear.bias = other.weight, other.bias
    assert torch.equal(linear(x), other(x))


def test_threads_do_not_share_what_they_dequantize():
    layers = [layer(300, 200, seed=seed) for seed in range(2)]
    x = torch.randn(40, 200)
    with torch.no_grad():
        expected = [linear(x) for linear in layers]
    wrong = []

    def compute(linear, right):
        with torch.no_grad():
            wrong.extend(n for n in range(200) if not torch.equal(linear(x), right))

    pairs = zip(layers, expected, strict=True)
    threads = [threading.Thread(target=compute, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
