"""One call for all examples of a row: which kernel takes what, and what reaches it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from llama_lora.train.compute import attention_kernels, packed_attention
from llama_lora.train.compute.attention_kernels import EFFICIENT, LOOP, VARLEN, kernel_for, only
from llama_lora.train.compute.packed_attention import BY_EXAMPLE, attend_within_examples
from tests.train.adapted import adapted_llama
from tests.train.compute.kernels import Recorded, aten, masked_product

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
P100, V100, T4, A100, A10, L4, H100, B200, RTX5080 = (
    (6, 0),
    (7, 0),
    (7, 5),
    (8, 0),
    (8, 6),
    (8, 9),
    (9, 0),
    (10, 0),
    (12, 0),
)
both = pytest.mark.parametrize("kernel", [VARLEN, EFFICIENT])

# ---------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "more", "expected"),
    [
        # FlashAttention: 16 bits from 8.0 up.
        *((BF16, 128, card, {}, VARLEN) for card in (A100, A10, L4, H100, B200, RTX5080)),
        (FP16, 64, A100, {}, VARLEN),
        (FP16, 64, A100, {"window": 9}, VARLEN),
        (BF16, 80, A100, {}, VARLEN),
        (BF16, 256, A100, {}, VARLEN),
        (BF16, 256, L4, {}, VARLEN),
        (BF16, 264, A100, {}, EFFICIENT),
        (BF16, 12, A100, {}, LOOP),  # neither takes that
        # Going backward with sizes above 192, where shared memory is small.
        (BF16, 208, A100, {}, VARLEN),
        (BF16, 192, A10, {}, VARLEN),
        *((BF16, size, card, {}, EFFICIENT) for size in (200, 224) for card in (A10, L4, RTX5080)),
        (BF16, 224, L4, {"gradient": False}, VARLEN),
        # The memory-efficient kernel: older cards, and fp32.
        *((FP16, 128, card, {}, EFFICIENT) for card in (P100, V100, T4)),
        *((FP16, 128, card, {"window": 9}, EFFICIENT) for card in (P100, V100, T4)),
        *((FP32, 128, card, {}, EFFICIENT) for card in (P100, V100, T4, A100, H100, RTX5080)),
        (FP32, 128, T4, {"window": 9}, EFFICIENT),
        (BF16, 128, T4, {}, LOOP),
        # In fp32 on a P100 its backward pass reads memory that nobody wrote, beyond a window.
        (FP32, 128, P100, {"window": 9}, LOOP),
        (FP32, 128, P100, {"window": 9, "gradient": False}, EFFICIENT),
        # Rows have to start where tensor cores can read them.
        (FP16, 12, P100, {}, EFFICIENT),
        (FP16, 12, V100, {}, LOOP),
        (FP16, 12, T4, {}, LOOP),
        (FP16, 16, T4, {}, EFFICIENT),
        (FP32, 6, T4, {}, EFFICIENT),
        (FP32, 6, A100, {}, LOOP),
        (FP32, 12, A100, {}, EFFICIENT),
        (torch.float64, 64, A100, {}, LOOP),
        # A CPU, and dropout of attention weights.
        (FP32, 64, None, {}, LOOP),
        (BF16, 64, None, {}, LOOP),
        (BF16, 64, A100, {"dropout": 0.1}, LOOP),
        (FP16, 64, T4, {"dropout": 0.1}, LOOP),
        # Older than torch's builds, and newer than the memory-efficient kernel knows.
        (FP16, 64, (3, 7), {}, LOOP),
        (FP32, 64, (13, 0), {}, LOOP),
    ],
)
def test_which_kernel_takes_what(dtype, size, capability, more, expected):
    assert kernel_for(dtype, size, capability, **more) == expected


# ---------------------------------------------------------------------- what reaches them


def given_row(lengths, groups=3, size=16, dtype=FP32, device="cpu", heads=2):
    """Queries, keys and values as a base's layers have them: tokens first in memory."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = ((1, sum(lengths), n, size) for n in (heads * groups, heads, heads))
    return [
        torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2).requires_grad_()
        for shape in shapes
    ]


def value_and_gradients(row, window=None, **options):
    result, _ = attend_within_examples(None, *row, window, **options)
    upstream = torch.linspace(-1, 1, result.numel(), dtype=row[0].dtype).view(result.shape)
    return result, *torch.autograd.grad(result, row, upstream.to(result.device))


@both
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_lengths_windows_and_scale_reach_the_kernel(kernel, window, scaling, groups):
    """Forward and backward: from what it gets, it computes what the loop computes."""
    lengths = [5, 33, 1, 20]
    row, options = given_row(lengths, groups), {"example_lengths": lengths, "scaling": scaling}
    expected = value_and_gradients(row, window, **options)
    with only(kernel), Recorded() as seen:
        found = value_and_gradients(row, window, **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    forward, backward = seen.of(kernel)
    assert len(forward) == len(backward) == 1
    for given in forward + backward:
        if kernel == EFFICIENT:
            assert given.get("window_size") == (window if window != 40 else None)
            assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (33, 33)
        else:
            left = window - 1 if window in (1, 7) else -1
            assert given["window_size"] == [left, 0]
            assert (given["max_q"], given["max_k"]) == (33, 33)
        assert given.get("scale") == scaling


@both
def test_rows_of_one_example_each(kernel):
    """As a base is called where nothing is packed."""
    row = [torch.randn(3, heads, 12, 8, requires_grad=True) for heads in (4, 2, 2)]
    expected = value_and_gradients(row)
    with only(kernel), Recorded():
        found = value_and_gradients(row)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@both
def test_a_layer_can_recompute(kernel):
    row, lengths = given_row([5, 9]), [5, 9]

    def layer(*row):
        return attend_within_examples(None, *row, 4, example_lengths=lengths)[0]

    def gradients(result):
        return torch.autograd.grad(result.square().sum(), row)

    with only(kernel), Recorded():
        expected = gradients(layer(*row))
        found = gradients(checkpoint(layer, *row, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@both
def test_autocast_applies(kernel):
    """As to `scaled_dot_product_attention`: a layer whose norms leave fp32 computes in 16 bits."""
    with only(kernel), Recorded() as seen, torch.autocast("cpu", BF16):
        result, *gradients = value_and_gradients(given_row([5, 9]), example_lengths=[5, 9])
    (given,), _ = seen.of(kernel)
    assert {given[name].dtype for name in ("query", "key", "value")} == {BF16}
    assert result.dtype == BF16
    assert {gradient.dtype for gradient in gradients} == {FP32}


@pytest.mark.parametrize("gradient", [True, False])
def test_log_sums_only_where_a_backward_pass_follows(gradient):
    row = given_row([40, 9], device="meta", dtype=FP16)
    with only(EFFICIENT), Recorded() as seen, torch.set_grad_enabled(gradient):
        attend_within_examples(None, *row, None, example_lengths=[40, 9])
    (given,), _ = seen.of(EFFICIENT)
    assert bool(given.get("compute_log_sumexp")) == gradient


def test_where_examples_start():
    found = attention_kernels.starts((3, 1, 7), torch.device("cpu"))
    assert found.tolist() == [0, 3, 4, 11]
    assert found.dtype == torch.int32


# ---------------------------------------------------------------------- how much is launched


def tiny_llama(layers: int, device: str = "meta"):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(FP16)
    model.set_attn_implementation(BY_EXAMPLE)
    return model


def launched(kernel, examples: int, layers: int | None = None, recompute=False) -> Recorded:
    """What runs forward and backward: attention alone, or in a Llama of some layers."""
    lengths = [5 + number % 3 for number in range(examples)]
    with only(kernel):
        if layers is None:
            row = given_row(lengths, dtype=FP16, device="meta")
            with Recorded() as seen:
                value_and_gradients(row, 4, example_lengths=lengths)
            return seen
        model = tiny_llama(layers).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros(1, sum(lengths), dtype=torch.long, device="meta")
        # With a mask: without values, transformers cannot see whether positions restart.
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with Recorded() as seen:
            model.model(**given, example_lengths=lengths).last_hidden_state.sum().backward()
        return seen


@both
def test_operators_do_not_grow_with_the_examples(kernel):
    counts = {len(launched(kernel, examples).calls) for examples in (1, 20, 100)}
    assert len(counts) == 1
    assert len(launched(LOOP, 20).calls) > 20  # which this would show


@both
@pytest.mark.parametrize("recompute", [False, True])
def test_operators_of_a_llama_do_not_grow_with_the_examples(kernel, recompute):
    runs = [launched(kernel, examples, 2, recompute) for examples in (1, 20, 100)]
    assert len({len(seen.calls) for seen in runs}) == 1
    for seen in runs:
        forward, backward = seen.of(kernel)
        assert (len(forward), len(backward)) == (4 if recompute else 2, 2)


@both
def test_lengths_are_copied_to_the_card_once(kernel):
    """Whatever the number of layers; and they are made again for other lengths."""
    for layers in (1, 4):
        attention_kernels.starts.cache_clear()
        copied = launched(kernel, 20, layers, recompute=True).copied
        assert [list(one.shape) for one in copied] == [[21]]


# ---------------------------------------------------------------------- what they hold


@both
def test_what_waits_for_the_backward_pass(kernel):
    """Keys and values as they were before they are repeated, as the plan has it."""
    lengths, groups, size, saved = [60, 5, 33], 3, 16, {}

    def save(tensor):
        if tensor.device.type == "meta":
            saved[id(tensor)] = tensor
        return tensor

    row = given_row(lengths, groups, size, FP16, "meta")
    with only(kernel), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        attend_within_examples(None, *row, None, example_lengths=lengths)
    found = sum(one.nbytes for one in saved.values() if one.numel() > len(lengths) + 1)
    heads, query, key = 2 * groups, 2 * groups * size, 2 * size
    elements = 2 * (2 * query + 2 * key) * sum(lengths)
    assert found == elements + 4 * heads * attention_kernels.log_sums(kernel, lengths)


def test_what_padding_costs():
    """By the sources that `attention_kernels` names."""
    for kernel, log_sums, sum_rows in (
        (LOOP, 98, 98),
        (VARLEN, 98, 98 + 3 * 128),
        (EFFICIENT, 3 * 64, 3 * (128 + 128)),
    ):
        assert attention_kernels.log_sums(kernel, [60, 5, 33]) == log_sums
        assert attention_kernels.sum_rows(kernel, [60, 5, 33]) == sum_rows


# ---------------------------------------------------------------------- where there is none


@pytest.fixture
def on_a_card(monkeypatch):
    """The rule takes this CPU for a card."""

    def be(capability):
        monkeypatch.setattr(attention_kernels, "_capability", lambda device: capability)

    attention_kernels._is_there.cache_clear()
    yield be
    attention_kernels._is_there.cache_clear()


@pytest.mark.parametrize(("capability", "kernel"), [(A100, VARLEN), (T4, EFFICIENT)])
def test_a_card_gets_its_kernel(on_a_card, capability, kernel):
    on_a_card(capability)
    row = given_row([9, 5], dtype=FP16)
    with Recorded():  # the first time it is also tried whether it is there
        value_and_gradients(row, example_lengths=[9, 5])
    with Recorded() as seen:
        value_and_gradients(row, example_lengths=[9, 5])
    assert len(seen.of(kernel)[0]) == 1


@pytest.mark.parametrize(("capability", "kernel"), [(A100, VARLEN), (T4, EFFICIENT)])
def test_a_checkpointed_layer_may_be_the_first_to_ask(on_a_card, capability, kernel):
    on_a_card(capability)
    attention_kernels._is_there.cache_clear()
    query, key, value = given_row([9, 5], dtype=FP16)

    def layer(query):
        return attend_within_examples(None, query, key, value, None, example_lengths=[9, 5])[0]

    with Recorded():
        attended = checkpoint(layer, query, use_reentrant=False)
        assert torch.autograd.grad(attended.sum(), query)[0].any()


def changed(query, key, value, bias):
    """An operator with other arguments than it has today."""


@pytest.mark.parametrize(
    ("capability", "kernel", "place", "name", "instead"),
    [
        (A100, VARLEN, torch.nn.attention.varlen, "varlen_attn", None),
        (A100, VARLEN, torch.nn.attention.varlen, "varlen_attn", changed),
        (T4, EFFICIENT, torch.ops.aten, "_efficient_attention_forward", changed),
        (T4, EFFICIENT, torch.ops.aten, "_efficient_attention_backward", changed),
    ],
)
def test_without_its_operators_the_loop_computes_and_says_so_once(
    on_a_card, monkeypatch, capsys, capability, kernel, place, name, instead
):
    row, options = given_row([9, 5], dtype=FP16), {"example_lengths": [9, 5]}
    expected = value_and_gradients(row, **options)
    if instead is None:
        monkeypatch.delattr(place, name)
    else:
        monkeypatch.setattr(place, name, instead)
    on_a_card(capability)
    with Recorded() as seen:
        found = [value_and_gradients(row, **options) for _ in range(3)]
    assert seen.of(kernel)[1] == []
    for results in found:
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
    said = capsys.readouterr().err
    name = attention_kernels.NAMES[kernel]
    assert said.startswith(f"attention: torch {torch.__version__} has no {name} kernel")
    assert "examples are computed one by one" in said
    assert said.count("\n") == 1


def test_a_build_without_flash_attention(on_a_card, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # this build has none
    on_a_card(A100)
    value_and_gradients(given_row([9, 5], dtype=BF16), example_lengths=[9, 5])
    assert "built without FlashAttention" in capsys.readouterr().err


def test_a_base_attends_without_cudnn(tmp_path):
    torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default
    adapted_llama(tmp_path)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# ---------------------------------------------------------------------- the loop


@pytest.mark.parametrize(("dtype", "rounding"), [(FP32, 2e-6), (BF16, 2**-8), (FP16, 2**-11)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_the_loop_is_one_masked_product(monkeypatch, dtype, rounding, groups, window):
    """In fp64, of the same inputs; within a few roundings of the largest, or of 1."""
    monkeypatch.setattr(packed_attention, "BLOCK", 8)  # so that some examples have several
    packed_attention._band.cache_clear()
    lengths = [5, 33, 1, 20]
    row = given_row(lengths, groups, dtype=dtype)
    exact = [part.detach().double().requires_grad_() for part in row]
    result, *gradients = value_and_gradients(row, window, example_lengths=lengths)
    product = masked_product(*exact, lengths, window).transpose(1, 2)
    upstream = torch.linspace(-1, 1, result.numel(), dtype=dtype).view(result.shape)
    expected = torch.autograd.grad(product, exact, upstream.double())
    for one, other in zip([result, *gradients], [product, *expected], strict=True):
        largest = other.abs().max().clamp(min=1)
        assert (one.double() - other).abs().max() <= 4 * rounding * largest
    packed_attention._band.cache_clear()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_short_examples_on_a_cpu_go_backward_more_exactly(monkeypatch, dtype, groups):
    lengths = [40, 96, 7]
    row = given_row(lengths, groups, dtype=dtype)

    def gradients(row):
        return value_and_gradients(row, example_lengths=lengths)[1:]

    exact = gradients([one.detach().double().requires_grad_() for one in row])
    short = gradients(row)
    monkeypatch.setattr(packed_attention, "SHORT", 0)
    for ours, plain, truth in zip(short, gradients(row), exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).norm() < (plain - truth).norm()
        assert (ours - truth).norm() < 2 * torch.finfo(dtype).eps * truth.norm()


def test_values_of_another_size_are_not_for_the_short_way():
    query, key = (torch.randn(1, 2, 20, 16).bfloat16().requires_grad_() for _ in range(2))
    value = torch.randn(1, 2, 20, 8).bfloat16().requires_grad_()
    attended, _ = attend_within_examples(None, query, key, value, None)
    assert attended.shape == (1, 20, 2, 8)


def test_keys_on_a_card_are_repeated_once_for_all_examples():
    """For its kernels, which take no grouped queries; on a CPU they do."""
    repeated = aten.expand.default

    def copies(device):
        with Recorded() as seen:
            value_and_gradients(given_row([9, 5, 7], device=device), example_lengths=[9, 5, 7])
        shapes = [given["size"] for function, given in seen.calls if function is repeated]
        return sum(len(shape) == 5 for shape in shapes)

    assert copies("cpu") == 0
    assert copies("meta") == 2
