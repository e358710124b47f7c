"""The result of `make demo`: the run in figures, and three questions before and after.

python3 tools/demo_report.py --base .demo/base --adapter .demo/adapter --report .demo/report.html \\
    --evaluation .demo/evaluation.html
"""

import argparse
import json
import textwrap
from pathlib import Path

from llama_lora.cli import one_line_errors

SHOWN = 3  # questions, of those that the evaluation asked


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="base model folder")
    parser.add_argument("--adapter", type=Path, required=True, help="adapter folder")
    parser.add_argument("--report", type=Path, required=True, help="page about the corpus")
    parser.add_argument("--evaluation", type=Path, required=True, help="page about the adapter")
    return parser.parse_args()


@one_line_errors
def main(args: argparse.Namespace) -> None:
    print_summary(json.loads((args.adapter / "summary.json").read_text()))
    answers = json.loads(args.evaluation.with_suffix(".json").read_text())["answers"]
    for asked in answers["asked"][:SHOWN]:
        for turn in asked["turns"]:
            print(f"\n{turn['question']}")
            print(shown("base ", turn["base"]["text"]))
            print(shown("tuned", turn["adapter"]["text"]))
    print(
        f"\nLook: {args.evaluation} (the base and the adapter)\n"
        f"      {args.report} (the corpus)\n"
        f"      {args.adapter}/loss.png\n"
        "Ask your own:\n"
        f"    .venv/bin/python3 generate.py --base_model {args.base} --lora_weights {args.adapter}"
    )


def print_summary(run: dict) -> None:
    share = run["trainable_parameters"] / run["parameters"]
    rows = {
        "held-out loss before": f"{run['held_out_loss_before']:.3f}",
        "held-out loss after": f"{run['held_out_loss_after']:.3f}",
        "trainable parameters": f"{run['trainable_parameters']:,} ({share:.2%})",
        "labelled tokens": f"{run['labelled_tokens']:,}",
        "minutes": f"{run['minutes']:.1f}",
        "peak memory": f"{run['peak_memory_bytes'] / 2**30:.1f} GiB",
        "on": f"{run['device']}, {run['quantization']} base, {run['compute_dtype']}",
    }
    print()
    for name, value in rows.items():
        print(f"{name:<22}{value}")


def shown(who: str, answer: str) -> str:
    return textwrap.fill(
        " ".join(answer.split()),
        width=92,
        initial_indent=f"  {who}  ",
        subsequent_indent=" " * 9,
    )


if __name__ == "__main__":
    main(parse_args())
