"""How fast the device computes the products of matrices that a base is made of."""

import json
import time
from itertools import pairwise
from pathlib import Path


def peak_rate(base: Path, tokens: int, seconds: float = 0.5) -> float:
    """FLOP/s of the fastest of the model's own matrix products, in the dtype it trains in."""
    import torch

    from llama_lora.hardware.device import compute_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = json.loads((base / "config.json").read_text())
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    best = 0.0
    shapes = (hidden, hidden), (hidden, wide), (wide, hidden), (hidden, config["vocab_size"])
    for rows in (512, tokens):
        for inner, outer in shapes:
            left = torch.randn(rows, inner, device=device, dtype=compute_dtype())
            right = torch.randn(inner, outer, device=device, dtype=compute_dtype())
            took = fastest(lambda: torch.mm(left, right), seconds)  # noqa: B023
            best = max(best, 2 * rows * inner * outer / took)
    return best


def fastest(action, seconds: float = 0.5) -> float:
    """Seconds of the quickest call among those of about `seconds`."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = [time.perf_counter()]
    while times[-1] - times[0] < seconds or len(times) < 4:
        action()
        wait()
        times.append(time.perf_counter())
    return min(later - earlier for earlier, later in pairwise(times))
