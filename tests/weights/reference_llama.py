"""Meta's Llama, computed straight from the shards of a checkpoint: an oracle for the conversion.

Written from the papers' formulas and Meta's description of its layout: rotary positions as complex
numbers, each shard a model-parallel rank that holds whole heads (column-parallel wq, wk, wv, w1,
w3, output; row-parallel wo, w2) and whose partial results are summed. It never joins two shards'
weights, and shares no code with the package.
"""

import json
import math

import torch

Shards = list[dict[str, torch.Tensor]]


def random_shards(
    params: dict,
    vocab_size: int,
    hidden: int,
    count: int,
    *,
    tied: bool = False,
    vocab_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Shards:
    """A random checkpoint of `count` shards.

    `vocab_parallel` cuts the embeddings by rows (Llama 3), otherwise by columns (LLaMA 1, 2).
    """
    generator = torch.Generator().manual_seed(seed)
    dim, heads = params["dim"], params["n_heads"]
    head_dim = dim // heads
    kv_heads = params.get("n_kv_heads") or heads
    local_kv = max(kv_heads // count, 1)

    def random(rows: int, columns: int) -> torch.Tensor:
        # Large enough for attention to be sharp, so that a wrong rotation shows.
        weight = torch.randn(rows, columns, generator=generator) * (1.2 / math.sqrt(dim))
        return weight.to(dtype)

    def norm() -> torch.Tensor:
        return (1 + 0.3 * torch.randn(dim, generator=generator)).to(dtype)

    shards = [{} for _ in range(count)]
    for rank, shard in enumerate(shards):
        rows, columns = (vocab_size // count, dim) if vocab_parallel else (vocab_size, dim // count)
        shard["tok_embeddings.weight"] = random(rows, columns)
        if not tied:
            shard["output.weight"] = random(vocab_size // count, dim)
        shard["norm.weight"] = shards[0]["norm.weight"] if rank else norm()
        for layer in range(params["n_layers"]):
            prefix = f"layers.{layer}."
            # With fewer key-value heads than ranks, neighbouring ranks hold the same head.
            twin = (
                shards[rank // (count // kv_heads) * (count // kv_heads)]
                if kv_heads < count
                else shard
            )
            shape = (local_kv * head_dim, dim)
            shard |= {
                prefix + "attention.wq.weight": random(heads // count * head_dim, dim),
                prefix + "attention.wo.weight": random(dim, heads // count * head_dim),
                prefix + "feed_forward.w1.weight": random(hidden // count, dim),
                prefix + "feed_forward.w2.weight": random(dim, hidden // count),
                prefix + "feed_forward.w3.weight": random(hidden // count, dim),
            }
            for name in ("attention.wk.weight", "attention.wv.weight"):
                shard[prefix + name] = twin[prefix + name] if twin is not shard else random(*shape)
            for name in ("attention_norm.weight", "ffn_norm.weight"):
                shard[prefix + name] = shards[0][prefix + name] if rank else norm()
    return shards


def write_shards(folder, params: dict, shards: Shards) -> None:
    """Save the shards and `params.json` as Meta ships them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for rank, shard in enumerate(shards):
        torch.save(
            {name: t.clone() for name, t in shard.items()}, folder / f"consolidated.{rank:02}.pth"
        )


def logits(
    params: dict, shards: Shards, tokens: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """Logits (tokens, vocabulary) of one sequence, in float32.

    `scale` is the factor of Llama 3.1's rotary scaling, None where there is none.
    """
    dim, heads, eps = params["dim"], params["n_heads"], params["norm_eps"]
    head_dim, ranks, length = dim // heads, range(len(shards)), len(tokens)
    weights = [{name: tensor.float() for name, tensor in shard.items()} for shard in shards]
    rotation = rotations(head_dim, length, params.get("rope_theta", 10_000.0), scale)
    future = torch.full((length, length), -math.inf).triu(1)

    def rms_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weights[0][name]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        numbers = torch.view_as_complex(x.reshape(length, -1, head_dim // 2, 2))
        return torch.view_as_real(numbers * rotation[:, None]).reshape(length, -1, head_dim)

    def attention(x: torch.Tensor, rank: int, prefix: str) -> torch.Tensor:
        w = {
            name: weights[rank][f"{prefix}attention.{name}.weight"]
            for name in ("wq", "wk", "wv", "wo")
        }
        query, key = rotate(x @ w["wq"].T), rotate(x @ w["wk"].T)
        value = (x @ w["wv"].T).reshape(length, -1, head_dim)
        share = query.shape[1] // key.shape[1]
        answers = []
        for head in range(query.shape[1]):
            scores = query[:, head] @ key[:, head // share].T / math.sqrt(head_dim) + future
            answers.append(scores.softmax(-1) @ value[:, head // share])
        return torch.cat(answers, -1) @ w["wo"].T

    def feed_forward(x: torch.Tensor, rank: int, prefix: str) -> torch.Tensor:
        w1, w2, w3 = (weights[rank][f"{prefix}feed_forward.w{i}.weight"] for i in (1, 2, 3))
        gate = x @ w1.T
        return (gate * gate.sigmoid() * (x @ w3.T)) @ w2.T

    x = embed(weights, tokens, dim)
    for layer in range(params["n_layers"]):
        prefix = f"layers.{layer}."
        normed = rms_norm(x, prefix + "attention_norm.weight")
        x = x + sum(attention(normed, rank, prefix) for rank in ranks)
        normed = rms_norm(x, prefix + "ffn_norm.weight")
        x = x + sum(feed_forward(normed, rank, prefix) for rank in ranks)
    x = rms_norm(x, "norm.weight")
    if "output.weight" in weights[0]:
        return torch.cat([x @ weights[rank]["output.weight"].T for rank in ranks], -1)
    tables = [weights[rank]["tok_embeddings.weight"] for rank in ranks]
    if tables[0].shape[1] == dim:
        return torch.cat([x @ table.T for table in tables], -1)
    parts = x.split(tables[0].shape[1], dim=-1)
    return sum(part @ table.T for part, table in zip(parts, tables, strict=True))


def embed(weights: Shards, tokens: torch.Tensor, dim: int) -> torch.Tensor:
    """Token embeddings from tables cut by columns or, each rank knowing its own ids, by rows."""
    tables = [shard["tok_embeddings.weight"] for shard in weights]
    if tables[0].shape[1] < dim:
        return torch.cat([table[tokens] for table in tables], -1)
    rows, result = tables[0].shape[0], torch.zeros(len(tokens), dim)
    for rank, table in enumerate(tables):
        own = (tokens >= rank * rows) & (tokens < (rank + 1) * rows)
        result[own] = table[tokens[own] - rank * rows]
    return result


def rotations(head_dim: int, length: int, theta: float, scale: float | None) -> torch.Tensor:
    """The unit complex numbers (length, head_dim / 2) that positions turn queries and keys by."""
    turns = []
    for pair in range(head_dim // 2):
        frequency = theta ** (-2 * pair / head_dim)
        wavelength = 2 * math.pi / frequency
        if scale and wavelength > 8192:
            frequency /= scale
        elif scale and wavelength > 8192 / 4:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / scale + smooth * frequency
        turns.append(frequency)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), torch.tensor(turns).double())
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
