"""What reaches the kernels of cards, without a card: every operator is recorded with its arguments.

The kernels themselves are computed by their definition, from the arguments they get, so that values
and gradients can be compared on a CPU; of tensors without values, only the shapes.
"""

import torch
from torch.nn.attention import varlen  # noqa: F401  (registers its operators)
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

aten, of_varlen = torch.ops.aten, torch.ops.torch_attn
FORWARD = {
    "varlen": of_varlen._varlen_attn.default,
    "efficient": aten._efficient_attention_forward.default,
}
BACKWARD = {
    "varlen": of_varlen._varlen_attn_backward.default,
    "efficient": aten._efficient_attention_backward.default,
}
KERNELS = {**FORWARD, **BACKWARD}
CAUSAL_FROM_TOP_LEFT = 1


def masked_product(query, key, value, lengths, window, scale=None):
    """One product with a mask of tokens × tokens, by the definition of a window.

    Args:
        query, key, value: [rows, heads, tokens, size].
    """
    mask = _mask(lengths, window)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True, scale=scale
    )


def _mask(lengths: list[int], window: int | None) -> torch.Tensor:
    """Whether a query sees a key: [tokens, tokens]."""
    tokens = torch.arange(sum(lengths))
    example = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = tokens[:, None] - tokens
    seen = (distance >= 0) & (example[:, None] == example)
    return seen & (distance < window) if window else seen


class Recorded(TorchDispatchMode):
    """Each operator that runs under it, with its arguments by name, in `calls`."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = [argument.name for argument in function._schema.arguments]
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        self.calls.append((function, given))
        for computed, of in ((_forward, FORWARD), (_backward, BACKWARD)):
            for kernel, operator in of.items():
                if function is operator:
                    return computed(kernel, given)
        return function(*args, **(kwargs or {}))

    def of(self, kernel: str) -> tuple[list[dict], list[dict]]:
        """The arguments of each call of a kernel, forward and backward."""
        return tuple(
            [given for function, given in self.calls if function is of[kernel]]
            for of in (FORWARD, BACKWARD)
        )

    @property
    def copied(self) -> list:
        """What came from another device."""
        copies = (given for function, given in self.calls if function is aten._to_copy.default)
        return [
            one["self"]
            for one in copies
            if one.get("device", one["self"].device) != one["self"].device
        ]


def _forward(kernel: str, given: dict) -> tuple:
    query = given["query"]
    attended = torch.empty_like(query) if query.is_meta else _attended(kernel, given)
    if kernel == "varlen":
        sums = query.new_empty(query.shape[1::-1], dtype=torch.float32)
        return attended, sums, torch.empty(2, dtype=torch.uint64, device=query.device)
    examples, longest = len(given["cu_seqlens_q"]) - 1, given["max_seqlen_q"]
    aligned = -(-longest // 32) * 32 if given.get("compute_log_sumexp") else 0
    sums = query.new_empty(examples, query.shape[2], aligned, dtype=torch.float32)
    seed = torch.empty((), dtype=torch.long)
    return attended, sums, seed, seed.clone(), longest, given["max_seqlen_k"]


def _backward(kernel: str, given: dict) -> tuple:
    parts = [given[name] for name in ("query", "key", "value")]
    if kernel == "efficient":
        assert given["logsumexp"].shape[2] >= given["max_seqlen_q"]
    if parts[0].is_meta:
        found = [torch.empty_like(part) for part in parts]
    else:
        found = _gradients(kernel, given)
    return (*found, torch.empty(0))[: 3 if kernel == "varlen" else 4]


def _attended(kernel: str, given: dict) -> torch.Tensor:
    weights, _, _, value, _ = _weights(kernel, given)
    return _as_given(weights @ value, given["query"])


def _gradients(kernel: str, given: dict) -> list[torch.Tensor]:
    weights, query, key, value, scale = _weights(kernel, given)
    upstream = _heads_first(given["grad_out" if kernel == "varlen" else "grad_out_"])
    of_weights = upstream @ value.mT
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    found = of_scores @ key, of_scores.mT @ query, weights.mT @ upstream
    names = "query", "key", "value"
    return [_as_given(one, given[name]) for one, name in zip(found, names, strict=True)]


def _weights(kernel: str, given: dict) -> tuple:
    """The weights of attention with all that they are made of: [heads, tokens, …], in fp64.

    What a window means is said in varlen_attn's docstring, and in kernel_forward.h.
    """
    query, key, value = (_heads_first(given[name]) for name in ("query", "key", "value"))
    if kernel == "varlen":
        begins, also, longest = given["cu_seq_q"], given["cu_seq_k"], given["max_q"]
        left, right = given["window_size"]
        assert right == 0
        assert given["is_causal"] == (left == -1)
        window = left + 1 if left >= 0 else None
        groups = len(query) // len(key)
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    else:
        begins, also, longest = (
            given[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q")
        )
        window = given.get("window_size")
        assert given["custom_mask_type"] == CAUSAL_FROM_TOP_LEFT
        assert query.shape == key.shape == value.shape  # it takes no grouped queries
    assert torch.equal(begins, also)
    assert begins.dtype == torch.int32
    lengths = begins.diff().tolist()
    assert max(lengths) == longest
    scale = given.get("scale") or query.shape[-1] ** -0.5
    scores = (query @ key.mT * scale).masked_fill(~_mask(lengths, window), -torch.inf)
    return scores.softmax(-1), query, key, value, scale


def _heads_first(given: torch.Tensor) -> torch.Tensor:
    """[heads, tokens, size] in fp64, of [tokens, heads, size] or [1, tokens, heads, size]."""
    return given.reshape(given.shape[-3:]).transpose(0, 1).double()


def _as_given(computed: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The other way round; grouped queries' gradients are summed."""
    tokens, heads, size = given.shape[-3:]
    summed = computed.view(heads, -1, tokens, size).sum(1)
    return summed.transpose(0, 1).to(given.dtype).reshape(given.shape)
