"""Grouped-query attention for cards whose fused kernels do not support it.

On cards, only FlashAttention does (compute capability 8.0 and up). On older ones transformers' own
"sdpa" falls back to plain products, which hold heads × tokens × tokens scores: 4.3 GB a layer in
fp16 for a prompt of 8,192 tokens and 32 heads. Keys and values repeated for each query take 0.1 GB.
"""

from types import SimpleNamespace

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llama_lora.cli import InputError
from llama_lora.hardware.cards import FLASH_CAPABILITY, Card

UNGROUPED = "sdpa_ungrouped"


def implementation(card: Card) -> str:
    """The attention implementation for a model that answers on `card`."""
    on_card = card.capability is not None  # a CPU has a kernel of its own
    return UNGROUPED if on_card and card.capability < FLASH_CAPABILITY else "sdpa"


def sdpa_with_repeated_keys(
    module, query, key, value, attention_mask, s_aux=None, softcap=None, **others
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa", with keys and values repeated for each query.

    Args:
        query: [rows, heads, tokens, size]; key and value have as many heads, or a divisor of that.
        attention_mask: [rows, 1, tokens, tokens], or None: causal.

    Returns:
        [rows, tokens, heads, size], and None for the attention weights.

    Raises:
        InputError: the base has sinks or soft caps, which "sdpa" lacks.
    """
    if s_aux is not None or softcap is not None:
        raise InputError("attention with sinks or soft caps does not run on this card")
    rows, heads, tokens, size = query.shape
    groups = heads // key.shape[1]
    plain = SimpleNamespace()  # a module in which "sdpa" finds no groups
    if tokens > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        return sdpa_attention_forward(plain, query, key, value, attention_mask, **others)
    # A single token: the queries of a group become rows that share keys, so nothing is repeated.
    query = query.reshape(rows, key.shape[1], groups, size)
    others["is_causal"] = False
    attended, _ = sdpa_attention_forward(plain, query, key, value, attention_mask, **others)
    return attended.transpose(1, 2).reshape(rows, 1, heads, size), None


AttentionInterface.register(UNGROUPED, sdpa_with_repeated_keys)
AttentionMaskInterface.register(UNGROUPED, sdpa_mask)
