"""The memory plan beside what training then took, for several lengths, batches and precisions.

make .demo/base/config.json && python3 -m benchmarks.training.plan_accuracy --write

Each setting is a training of a few steps in a process of its own. Its plan is the one it made
before loading anything; measured is the peak of the process (of the card, where there is one).
"""

import argparse
import json
from pathlib import Path

from benchmarks import pages
from benchmarks import training_runs as runs

# Tokens of an example at most, examples of a micro-batch, precision, recomputation.
SETTINGS = [
    (512, 1, "8bit", "False"),
    (512, 4, "8bit", "False"),
    (512, 8, "8bit", "True"),
    (1024, 2, "4bit", "False"),
    (1024, 4, "none", "True"),
    (2048, 1, "none", "False"),
    (2048, 2, "4bit", "True"),
    (2048, 4, "8bit", "True"),
]


def parse_args() -> argparse.Namespace:
    parser = runs.parser(__doc__, "plan-accuracy.md")
    parser.add_argument("--steps", type=int, default=6, help="steps of each training")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    args.cache.mkdir(parents=True, exist_ok=True)
    chats, _ = runs.real_corpus(args.cache)
    results = [compare(chats, setting, args) for setting in SETTINGS]
    worst = max(abs(found["planned"] / found["measured"] - 1) for found in results)
    pages.publish(
        args,
        "The memory plan, and what training took",
        f"{pages.origin()}, one run after the other.",
        EXPLANATION,
        pages.table([row(found) for found in results]),
        f"The plan is off by {worst:.1%} at most.",
    )


def compare(chats: Path, setting: tuple, args: argparse.Namespace) -> dict:
    """The bytes that a training was planned to take, and those that it took."""
    length, rows, quantization, recompute = setting
    out = args.cache / "plan"
    data = runs.write(
        runs.draw(runs.pieces(chats, args.base, length, args.cache), 600),
        args.cache / f"plan-{length}.json",
    )
    run = runs.ours(
        args.base,
        data,
        out,
        *("--model_max_length", length, "--per_device_train_batch_size", rows),
        *("--quantization", quantization, "--gradient_checkpointing", recompute),
        *("--max_steps", args.steps, "--save_strategy", "no", "--ignore_memory_plan", "True"),
    )
    planned = json.loads((out / "summary.json").read_text())["planned"]
    return {"setting": setting, "planned": planned["memory_bytes"], "measured": run.peak_memory}


def row(found: dict) -> dict:
    length, rows, quantization, recompute = found["setting"]
    return {
        "length": length,
        "micro-batch": rows,
        "base": quantization,
        "recompute": recompute,
        "planned": pages.gib(found["planned"]),
        "measured": pages.gib(found["measured"]),
        "ratio": f"{found['planned'] / found['measured']:.2f}",
    }


EXPLANATION = """\
Each row is a training of a few steps on real chats with the default LoRA flags, in a process of its
own. Planned is what it estimated before it loaded a weight, from the base's config, the corpus and
the flags. Measured is the peak of the whole process (of the card, if there is one)."""


if __name__ == "__main__":
    main(parse_args())
