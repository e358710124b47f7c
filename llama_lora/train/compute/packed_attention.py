"""Attention that keeps the examples of a row apart: each attends to itself alone.

Nothing is padded to another's length, and nothing is masked but where a base has a window. A mask
of tokens × tokens would make the kernels of older cards compute all that it then throws away, and
at 40,000 tokens it takes 1.6 GB. transformers has a mask made once for all layers of a kind; in its
place they are handed what `attend_within_examples` needs to know of it: the window.
"""

import functools
from collections.abc import Iterator

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from llama_lora.cli import InputError

BY_EXAMPLE = "by_example"
STEP = 32  # tokens: queries in a block of torch's kernel for CPUs
BLOCK = 1024  # queries that share a mask, of their own and of a window's keys
ALIGNED = 8  # numbers; the memory-efficient kernel copies masks whose rows begin elsewhere
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
    """Causal attention within each example, as transformers calls it.

    Args:
        query: [rows, heads, tokens, size]; key and value with as many heads or a divisor of them.
        attention_mask: the window, see `window`.
        sliding_window: the same, from those models that tell it twice.
        example_lengths: tokens of each example, in their order along the rows; None: a row is one.

    Returns:
        [rows, tokens, heads, size], and no attention weights.

    Raises:
        InputError: the layer asks for more than that.
    """
    _check(attention_mask, sliding_window, others)
    groups = query.shape[1] // key.shape[1]
    lengths = example_lengths or [query.shape[2]]
    attended = [
        block
        for q, k, v in zip(*(whole.split(lengths, 2) for whole in (query, key, value)), strict=True)
        for block in _blocks(
            q,
            # Grouped queries are spelled out: the memory-efficient kernel takes none.
            k.repeat_interleave(groups, 1) if groups > 1 else k,
            v.repeat_interleave(groups, 1) if groups > 1 else v,
            attention_mask,
            dropout_p=dropout,
            scale=scaling,
        )
    ]
    return torch.cat(attended, 2).transpose(1, 2).contiguous(), None


def _check(attention_mask, sliding_window, others: dict) -> None:
    asked = [name for name, value in others.items() if value is not None]
    if unknown := sorted(set(asked) - IMMATERIAL):
        raise InputError(
            f"its layers attend with {', '.join(unknown)}; training and evaluation know windows, "
            "but no sinks (s_aux), soft caps (softcap) or others; take another base"
        )
    if not isinstance(attention_mask, int | None):
        raise InputError(
            "its layers attend by a mask that is neither causal nor a window; take another base"
        )
    if sliding_window not in (None, attention_mask):
        raise InputError(
            f"its layers attend with a window of {sliding_window}, and a mask for one of "
            f"{attention_mask}; take another base"
        )


def _blocks(query, key, value, window: int | None, **options) -> Iterator[torch.Tensor]:
    """What the queries of one example attend to, in their order: [rows, heads, some, size] each.

    Within a window's length of the first token all are seen; later queries go with the keys of
    their windows alone.
    """
    tokens = query.shape[2]
    plain = min(tokens, window or tokens)
    first = (_filled_up(whole[:, :, :plain]) for whole in (query, key, value))
    yield scaled_dot_product_attention(*first, is_causal=True, **options)[:, :, :plain]
    for start in range(plain, tokens, BLOCK):
        end, seen = min(start + BLOCK, tokens), start - window + 1
        yield scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, seen:end],
            value[:, :, seen:end],
            attn_mask=_band(window, query.dtype, query.device)[: end - start, : end - seen],
            **options,
        )


def _filled_up(example: torch.Tensor) -> torch.Tensor:
    """With zeros after the last token, on a CPU in 16 bits; what comes later no token attends to.

    There oneDNN makes several products for each length and each rest of a block, and keeps them:
    with lengths in steps there are few. The blocks are not computed faster for being cut short.

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

    One for all blocks, layers and steps, of [`BLOCK`, `window` + `BLOCK` - 1]. A mask of booleans
    would be made into one of these by every call, and kept for its backward pass.
    """
    width = -(-(window + BLOCK) // ALIGNED) * ALIGNED
    with torch.inference_mode(False):
        seen = torch.ones(BLOCK, width, dtype=torch.bool, device=device).triu().tril(window - 1)
        return torch.zeros(BLOCK, width, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def window(*, local_size: int | None = None, **_) -> int | None:
    """How many keys a query sees, itself and those right before it; None: all before it.

    transformers calls it where others make a mask; `attention_check` sees to it that a window is
    all of it.
    """
    return local_size


AttentionInterface.register(BY_EXAMPLE, attend_within_examples)
AttentionMaskInterface.register(BY_EXAMPLE, window)
