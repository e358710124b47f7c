"""Kernels that attend within all examples of a row in one call, and the rule that chooses one.

Cumulative lengths tell them where each example ends. Sources are cited from torch 2.13, below
aten/src/ATen/native/transformers/cuda.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from llama_lora.hardware.cards import FLASH_CAPABILITY
from llama_lora.text import brief

VARLEN, EFFICIENT, LOOP = "varlen", "efficient", "loop"
NAMES = {VARLEN: "FlashAttention", EFFICIENT: "memory-efficient"}
CAUSAL = 1  # CausalFromTopLeft of CustomMaskType in mem_eff_attention/kernel_forward.h
SMALLER = ((8, 6), (8, 9)), ((12, 0), (12, 1))  # generations with less shared memory than 8.0


def kernel_for(
    dtype: torch.dtype,
    head_size: int,
    capability: tuple[int, int] | None,
    *,
    dropout: float = 0.0,
    window: int | None = None,
    gradient: bool = True,
) -> str:
    """The kernel to attend by. (Grouped queries do not matter: each function here takes them.)

    Args:
        dtype: of queries, keys and values.
        capability: the card's compute capability; None: it is not a card.
        dropout: of attention weights, which neither kernel gets.
        window: how many keys a query sees; None: all of its example.
        gradient: whether a backward pass follows.

    Returns:
        `VARLEN`: FlashAttention; `EFFICIENT`: the memory-efficient kernel; or `LOOP`: one call of
        `scaled_dot_product_attention` for each example.
    """
    if capability is None or dropout:
        return LOOP
    if _flash_takes(dtype, head_size, capability, gradient):
        return VARLEN
    if _efficient_takes(dtype, head_size, capability, gradient and window is not None):
        return EFFICIENT
    return LOOP


def _flash_takes(dtype, head_size: int, capability: tuple[int, int], gradient: bool) -> bool:
    """By mha_varlen_fwd in flash_attn/flash_api.cpp.

    And by check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120 in sdp_utils.cpp.
    """
    smaller = any(first <= capability <= last for first, last in SMALLER)
    if gradient and smaller and 192 < head_size <= 224:
        return False
    if capability < FLASH_CAPABILITY or dtype not in (torch.float16, torch.bfloat16):
        return False
    return head_size % 8 == 0 and head_size <= 256


def _efficient_takes(dtype, head_size: int, capability: tuple[int, int], windowed: bool) -> bool:
    """By dispatch_cutlassF in mem_eff_attention/kernels/cutlassF.h, and cutlassB.h likewise.

    And by minimum_gemm_alignment in sdp_utils.cpp.

    Args:
        windowed: whether it goes backward with a window.
    """
    oldest = {torch.float32: (5, 0), torch.float16: (5, 0), torch.bfloat16: (8, 0)}
    if dtype not in oldest or not oldest[dtype] <= capability <= (12, 1):
        return False
    if windowed and dtype == torch.float32 and capability < (7, 0):
        # There kNeedsAccumGradQ is false in kernel_backward.h: the first block of keys stores a
        # query's dQ and others add to it, but behind a window the first block is skipped.
        return False
    if dtype == torch.float32:
        return head_size % (4 if capability >= (8, 0) else 1) == 0
    return head_size % (8 if capability >= (7, 0) else 1) == 0


# ---------------------------------------------------------------------- what they allocate


def log_sums(kernel: str, lengths) -> int:
    """How many log-sum-exps are kept for the backward pass, per head, in fp32.

    `EFFICIENT` has them for as many tokens of each example as the longest has, rounded up to
    kAlignLSE in kernel_forward.h.

    Args:
        lengths: tokens of each example of a row.
    """
    return len(lengths) * _up(max(lengths), 32) if kernel == EFFICIENT else int(sum(lengths))


def sum_rows(kernel: str, lengths) -> int:
    """How many rows of fp32 sums the backward pass takes, each as long as the queries of a token.

    `VARLEN` has 128 rows between examples in dQ's (dq_accum of mha_varlen_bwd in flash_api.cpp).
    `EFFICIENT` sums dQ in blocks of up to 128 rows, for each example as many as for the longest,
    and dK and dV in two blocks of 64 (workspace_size in kernel_backward.h).
    """
    if kernel == EFFICIENT:
        return len(lengths) * (_up(max(lengths), 128) + 128)
    return int(sum(lengths)) + 128 * len(lengths) * (kernel == VARLEN)


def _up(number: int, step: int) -> int:
    return -(-int(number) // step) * step


# ---------------------------------------------------------------------- the choice


_forced: str | None = None


@contextmanager
def only(kernel: str) -> Iterator[None]:
    """Meanwhile attention is computed by that kernel, to compare it with others."""
    global _forced
    before, _forced = _forced, kernel
    try:
        yield
    finally:
        _forced = before


def chosen(query, key, value, window: int | None, dropout: float) -> str:
    """The kernel for these tensors of [..., head size], among those that this torch has."""
    if _forced:
        return _forced
    kernel = kernel_for(
        query.dtype,
        query.shape[-1],
        _capability(query.device),
        dropout=dropout,
        window=window,
        gradient=_needs_gradient(query, key, value),
    )
    return kernel if kernel == LOOP or _is_there(kernel) else LOOP


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _needs_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@functools.cache
def _is_there(kernel: str) -> bool:
    """Whether this torch has the operators of a kernel, as they are called here; says so if not."""
    try:
        flash = torch.backends.cuda.is_flash_attention_available()
        if kernel == VARLEN and torch.cuda.is_available() and not flash:
            raise RuntimeError("it was built without FlashAttention")
        # With hooks of its own: a checkpointed layer would take what it saves for the layer's.
        with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(_same, _same):
            like = {"dtype": torch.float16, "device": "meta", "requires_grad": True}
            query, key = torch.empty(2, 2, 8, **like), torch.empty(2, 1, 8, **like)
            attended = ATTEND[kernel](query, key, key, (1, 1), None, None)
            torch.autograd.grad(attended.sum(), [query, key])
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        print(
            f"attention: torch {torch.__version__} has no {NAMES[kernel]} kernel as torch 2.13 has "
            f"it ({brief(error)}); examples are computed one by one, which is slower",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True


# ---------------------------------------------------------------------- the kernels


def attend(kernel: str, query, key, value, lengths: tuple[int, ...], window, scale) -> torch.Tensor:
    """Causal attention within each of the examples that come one after the other.

    Args:
        kernel: `VARLEN` or `EFFICIENT`.
        query: [tokens, heads, size]; key and value have as many heads, or a divisor of that.
        lengths: tokens of each example.
        window: how many keys a query sees, up to and including its own; None: all of its example.
        scale: of the scores; None: 1/√size.

    Returns:
        [tokens, heads, size].
    """
    return ATTEND[kernel](query, key, value, lengths, window, scale)


@functools.lru_cache(maxsize=2)
def starts(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where each example starts and the last one ends: int32, [examples + 1].

    One serves all layers of a micro-batch, forward, again and backward.
    """
    on_card = device.type == "cuda"
    with torch.inference_mode(False):
        here = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, pin_memory=on_card)
        return here.to(device, non_blocking=on_card)  # the host does not wait for the card


def _varlen(query, key, value, lengths, window, scale) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # which imports torch's compiler

    begins, longest = starts(lengths, query.device), max(lengths)
    return varlen_attn(
        *(query, key, value, begins, begins, longest, longest),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # keys before and after its own
        enable_gqa=query.shape[1] > key.shape[1],
    )


def _efficient(query, key, value, lengths, window, scale) -> torch.Tensor:
    examples = starts(lengths, query.device), max(lengths)
    gradient = _needs_gradient(query, key, value)
    return _Efficient.apply(query, key, value, *examples, window, scale, gradient)


class _Efficient(torch.autograd.Function):
    """The memory-efficient kernel.

    Torch's own backward pass of this operator forgets the window; this one also keeps keys and
    values as they were before they are repeated for the queries of their group, which the kernel
    does not take.

    Its `window_size` counts the query's own key, as ours does: kernel_forward.h masks column ≤ row
    - window_size, kernel_backward.h likewise. Both ignore 0, and take it with a causal mask alone.
    """

    @staticmethod
    def forward(ctx, query, key, value, begins, longest, window, scale, gradient):
        attended, log_sums, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
            *(query[None], _repeated(key, query), _repeated(value, query)),
            **_for_both(begins, longest, window, scale),
            compute_log_sumexp=gradient,
        )
        ctx.save_for_backward(query, key, value, begins, attended, log_sums, seed, offset)
        ctx.options = longest, window, scale
        return attended[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, begins, attended, log_sums, seed, offset = ctx.saved_tensors
        of_query, of_key, of_value, _ = torch.ops.aten._efficient_attention_backward(
            *(gradient[None], query[None], _repeated(key, query), _repeated(value, query)),
            **_for_both(begins, *ctx.options),
            out=attended,
            logsumexp=log_sums,
            philox_seed=seed,
            philox_offset=offset,
            bias_requires_grad=False,
        )
        return of_query[0], _summed(of_key, key), _summed(of_value, value), *[None] * 5


def _for_both(begins, longest: int, window: int | None, scale: float | None) -> dict:
    """What the operator takes forward and backward."""
    return {
        "bias": None,
        "cu_seqlens_q": begins,
        "cu_seqlens_k": begins,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "dropout_p": 0.0,
        "custom_mask_type": CAUSAL,
        "scale": scale,
        "window_size": window,
    }


def _repeated(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[1, tokens, heads of the queries, size]; a copy only if queries are grouped."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key[None]
    return key[:, :, None].expand(-1, -1, groups, -1).flatten(1, 2)[None]


def _summed(gradient: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The gradient of keys or values, summed over the queries of each group."""
    if gradient.shape[2] == key.shape[1]:
        return gradient[0]
    return gradient[0].unflatten(1, (key.shape[1], -1)).sum(2)


ATTEND = {VARLEN: _varlen, EFFICIENT: _efficient}
