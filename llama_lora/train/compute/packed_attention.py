"""Attention that keeps the examples of a row apart: each one attends only to itself.

On a card one kernel computes all examples in one call, see `attention_kernels`; on a CPU, and for
what the kernels do not take, each example has a call of its own.

Nothing is padded, and there is no mask of tokens × tokens: the kernels of older cards would compute
everything that it hides, and at 40,000 tokens it takes 1.6 GB. transformers makes one mask for all
layers of a kind; here the layers get the only thing that `attend_within_examples` needs to know
instead: the window.
"""

import functools
from collections.abc import Iterator

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from llama_lora.cli import InputError
from llama_lora.hardware.device import autocast
from llama_lora.train.compute import attention_kernels
from llama_lora.train.compute.attention_kernels import LOOP

BY_EXAMPLE = "by_example"
STEP = 32  # tokens: the queries in a block of torch's kernel for CPUs
SHORT = 384  # tokens up to which torch's kernel for CPUs goes backward faster in fp32
BLOCK = 1024  # queries that share a mask over their own and a window's keys
ALIGNED = 8  # elements; the memory-efficient kernel copies masks with other row starts
IMMATERIAL = {"position_ids", "use_cache", "output_router_logits"}  # to what a query attends to


def attend_within_examples(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    example_lengths: list[int] | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example, with the signature that transformers calls.

    Args:
        query: [rows, heads, tokens, size]; key and value have as many heads, or a divisor of that.
        attention_mask: the window, see `window`.
        sliding_window: the same, from models that pass it twice.
        example_lengths: tokens of each example, in order along the rows; None: each row is one.

    Returns:
        [rows, tokens, heads, size], and None for the attention weights.

    Raises:
        InputError: the layer needs more than that.
    """
    _check(attention_mask, sliding_window, others)
    query, key, value = autocast(query, key, value)
    rows, _, tokens, _ = query.shape
    lengths = tuple(example_lengths or [tokens])
    beyond = attention_mask is not None and attention_mask < max(lengths)
    window = attention_mask if beyond else None
    kernel = attention_kernels.chosen(query, key, value, window, dropout)
    if kernel == LOOP:
        options = {"dropout_p": dropout, "scale": scaling}
        return _one_by_one(query, key, value, lengths, window, **options), None
    row = (whole.transpose(1, 2).flatten(0, 1) for whole in (query, key, value))
    attended = attention_kernels.attend(kernel, *row, rows * lengths, window, scaling)
    return attended.unflatten(0, (rows, tokens)), None


def _check(attention_mask, sliding_window, others: dict) -> None:
    asked = [name for name, value in others.items() if value is not None]
    if unknown := sorted(set(asked) - IMMATERIAL):
        raise InputError(
            f"its layers attend with {', '.join(unknown)}; training and evaluation support "
            "windows, but not sinks (s_aux), soft caps (softcap) or others; use another base"
        )
    if not isinstance(attention_mask, int | None):
        raise InputError(
            "its layers attend by a mask that is neither causal nor a window; use another base"
        )
    if sliding_window not in (None, attention_mask):
        raise InputError(
            f"its layers attend with a window of {sliding_window}, but a mask for one of "
            f"{attention_mask}; use another base"
        )


def _one_by_one(query, key, value, lengths, window, **options) -> torch.Tensor:
    """The attention of each example after the other: [rows, tokens, heads, size]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type != "cpu":
        # The memory-efficient kernel takes no grouped queries.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        groups = 1
    attended = [
        block
        for example in zip(*(whole.split(lengths, 2) for whole in (query, key, value)), strict=True)
        for block in _blocks(*example, window, enable_gqa=groups > 1, **options)
    ]
    return torch.cat(attended, 2).transpose(1, 2).contiguous()


def _blocks(query, key, value, window: int | None, **options) -> Iterator[torch.Tensor]:
    """The attention of one example, in blocks of queries in order: [rows, heads, some, size] each.

    The first window of queries sees all earlier tokens; each later block of queries gets only the
    keys of its windows.
    """
    tokens = query.shape[2]
    plain = min(tokens, window or tokens)
    first = [_filled_up(whole[:, :, :plain]) for whole in (query, key, value)]
    short = value.shape == key.shape and _is_short(query, plain, **options)
    attend = _Short.attend if short else scaled_dot_product_attention
    yield attend(*first, is_causal=True, **options)[:, :, :plain]
    for start in range(plain, tokens, BLOCK):
        end, seen = min(start + BLOCK, tokens), start - window + 1
        yield scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, seen:end],
            value[:, :, seen:end],
            attn_mask=_band(window, query.dtype, query.device)[: end - start, : end - seen],
            **options,
        )


def _is_short(query: torch.Tensor, tokens: int, dropout_p: float, **_) -> bool:
    """Whether `_Short` is for such a block."""
    in_16_bits = query.device.type == "cpu" and query.dtype.itemsize == 2
    return in_16_bits and tokens <= SHORT and not dropout_p and torch.is_grad_enabled()


class _Short(torch.autograd.Function):
    """Causal attention on a CPU in 16 bits, with a backward pass in fp32.

    In 16 bits torch's kernel goes backward over tiles of `STEP` tokens: for few tokens that takes
    up to four times as long, and it rounds more often.
    """

    @classmethod
    def attend(cls, query, key, value, *, scale=None, **_) -> torch.Tensor:
        """As `scaled_dot_product_attention` with `is_causal` and `enable_gqa`."""
        return cls.apply(query, key, value, scale)

    @staticmethod
    def forward(ctx, query, key, value, scale):
        ctx.scale = scale
        attended, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scale
        )
        ctx.save_for_backward(query, key, value, attended, log_sums)
        return attended

    @staticmethod
    def backward(ctx, upstream):
        *saved, log_sums = ctx.saved_tensors
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(one.float() for one in (upstream, *saved)), log_sums, 0.0, True, scale=ctx.scale
        )
        return *(one.to(upstream.dtype) for one in gradients), None


def _filled_up(example: torch.Tensor) -> torch.Tensor:
    """The example, on a CPU in 16 bits with zeros after the last token; no token attends to them.

    There oneDNN compiles several products for each length and each remainder of a block, and keeps
    them; with rounded lengths they are few. Shorter blocks would not be computed faster.

    Args:
        example: [rows, heads, tokens, size].
    """
    lacking = -example.shape[2] % STEP
    if not lacking or example.device.type != "cpu" or example.dtype.itemsize != 2:
        return example
    return pad(example, (0, 0, 0, lacking))


@functools.lru_cache(maxsize=2)
def _band(window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What is added to the scores of a block: 0 in each query's window, else minus infinity.

    One serves all blocks, layers and steps: [`BLOCK`, `window` + `BLOCK` - 1]. Every call would
    turn a boolean mask into one of these, and keep it for the backward pass.
    """
    width = -(-(window + BLOCK) // ALIGNED) * ALIGNED
    with torch.inference_mode(False):
        seen = torch.ones(BLOCK, width, dtype=torch.bool, device=device).triu().tril(window - 1)
        return torch.zeros(BLOCK, width, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def window(*, local_size: int | None = None, **_) -> int | None:
    """How many keys a query sees, up to and including its own; None: all of them.

    transformers calls it where other implementations make a mask; `attention_check.windows` makes
    sure that the mask would be nothing but a window.
    """
    return local_size


AttentionInterface.register(BY_EXAMPLE, attend_within_examples)
AttentionMaskInterface.register(BY_EXAMPLE, window)
