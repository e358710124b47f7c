"""Attention that keeps the examples of a row apart: each attends to itself alone.

Nothing is padded or masked. A mask of tokens × tokens would make the kernels of older cards compute
all that it then throws away, and at 40,000 tokens it takes 1.6 GB.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

BY_EXAMPLE = "by_example"


def attend(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    example_lengths: list[int] | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example, as transformers calls it.

    Args:
        query: [rows, heads, tokens, size]; key and value with as many heads or a divisor of them.
        example_lengths: tokens of each example, in their order along the rows; None: a row is one.

    Returns:
        [rows, tokens, heads, size], and no attention weights.
    """
    groups = query.shape[1] // key.shape[1]
    lengths = example_lengths or [query.shape[2]]
    attended = [
        scaled_dot_product_attention(
            q,
            # Grouped queries are spelled out: the memory-efficient kernel takes none.
            k.repeat_interleave(groups, 1) if groups > 1 else k,
            v.repeat_interleave(groups, 1) if groups > 1 else v,
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
        )
        for q, k, v in zip(*(whole.split(lengths, 2) for whole in (query, key, value)), strict=True)
    ]
    return torch.cat(attended, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(BY_EXAMPLE, attend)
