"""Memory and time of the loss at a batch of 14 × 2,048 tokens: plain, and in chunks.

python3 -m benchmarks.training.loss_memory --write

Each runs in a process of its own, forward and backward, on hidden states of which all or
`--labelled` are learned. Extra memory is the peak above what the inputs take.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import psutil

from benchmarks import pages
from llama_lora.model.labels import IGNORE


def parse_args() -> argparse.Namespace:
    parser = pages.parser(__doc__, "loss-memory.md")
    parser.add_argument("--tokens", type=int, default=28_672)
    parser.add_argument("--words", type=int, default=32_000, help="size of the vocabulary")
    parser.add_argument("--hidden", type=int, default=1_024, help="size of the hidden states")
    parser.add_argument("--labelled", type=float, default=1.0, help="labelled share of the tokens")
    parser.add_argument("--kind", choices=["plain", "chunks"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.kind:
        print(json.dumps(measure(args)))
        return
    results = {kind: in_own_process(kind) for kind in ("plain", "chunks")}
    pages.publish(args, "Memory of the loss", meaning(args), pages.table(rows(results), left=1))


def in_own_process(kind: str) -> dict:
    command = [sys.executable, *pages.this(), "--kind", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict:
    """Loss, norm of its gradient, seconds and extra peak memory in bytes of one kind of loss."""
    import torch

    from llama_lora.train.compute.chunked_loss import linear_cross_entropy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, device=device, requires_grad=True)
    weight = torch.randn(args.words, args.hidden, device=device).div_(args.hidden**0.5)
    labels = torch.randint(args.words, (args.tokens,), device=device)
    labels[torch.rand(args.tokens, device=device) >= args.labelled] = IGNORE
    before, began = held(device), time.perf_counter()
    if args.kind == "plain":
        logits = torch.nn.functional.linear(hidden, weight).float()
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    else:
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    return {
        "loss": loss.item() / args.tokens,
        "gradient": hidden.grad.norm().item(),
        "seconds": time.perf_counter() - began,
        "extra": peak(device) - before,
    }


def held(device: str) -> int:
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def peak(device: str) -> int:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def meaning(args: argparse.Namespace) -> str:
    return f"""\
{pages.origin()}:
{args.tokens:,} tokens, hidden states of {args.hidden:,} in fp32, a vocabulary of {args.words:,},
{args.labelled:.0%} of the tokens labelled; forward and backward, each loss in a process of its own.
The gradient of the hidden states, which both hold, is part of the extra memory."""


def rows(results: dict) -> list[dict]:
    return [
        {
            "loss": kind,
            "extra peak memory": f"{one['extra'] / 1e6:,.0f} MB",
            "seconds": f"{one['seconds']:.1f}",
            "loss per token": f"{one['loss']:.6f}",
            "norm of the gradient": f"{one['gradient']:.6f}",
        }
        for kind, one in results.items()
    ]


if __name__ == "__main__":
    main(parse_args())
