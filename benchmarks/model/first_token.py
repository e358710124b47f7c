"""How soon an answer begins, how fast it goes on, and what batches make of it.

make demo && python3 -m benchmarks.model.first_token --write

A chat asks question after question, all of which stay in its context; the first token of each
answer is awaited. Then as many questions are answered one by one and in a batch.
"""

import argparse
import statistics
import time
from pathlib import Path

from benchmarks import pages
from benchmarks.pages import ROOT

TOPICS = ["rain", "bread", "trains", "glass", "bees", "chess", "salt", "clouds"]


def parse_args() -> argparse.Namespace:
    parser = pages.parser(__doc__, "first-token.md")
    add = parser.add_argument
    add(
        "--base_model",
        type=Path,
        default=ROOT / ".demo/base",
        help="Hugging Face model folder",
    )
    add("--lora_weights", type=Path, default=ROOT / ".demo/adapter", help="adapter folder")
    add("--tokens", type=int, default=48, help="longest answer, in tokens")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    from llama_lora.chat.adapters import load
    from llama_lora.chat.sampling import Sampling

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sampling = Sampling(temperature=0, max_new_tokens=args.tokens)
    model, template, summary = load(args.base_model, args.lora_weights)
    waits, rate = chat(model, template, sampling)
    rates = {size: batch(model, template, sampling, size) for size in (1, len(TOPICS))}
    pages.publish(
        args,
        "How soon an answer begins",
        meaning(args, model, summary),
        pages.table(figures(waits, rate, rates), left=1),
    )


def chat(model, template, sampling) -> tuple[list[float], float]:
    """Seconds until each answer began, and tokens a second from there on."""
    from llama_lora.chat.session import Chat

    chat, waits, seconds, tokens = Chat(model, template, sampling), [], 0.0, 0
    for topic in TOPICS:
        asked = time.perf_counter()
        pieces = chat.stream(question(topic))
        next(pieces)
        began = time.perf_counter()
        waits.append(began - asked)
        for _ in pieces:
            pass
        seconds += time.perf_counter() - began
        answer = template.tokenizer(chat.turns[-1]["value"], add_special_tokens=False)
        tokens += len(answer["input_ids"]) - 1
    return waits, tokens / seconds


def batch(model, template, sampling, size: int) -> float:
    """Tokens a second over all answers."""
    from llama_lora.chat.batch import answers

    asked = [[{"from": "human", "value": question(topic)}] for topic in TOPICS]
    began = time.perf_counter()
    written = sum(len(answer.tokens) for answer in answers(model, template, asked, sampling, size))
    return written / (time.perf_counter() - began)


def meaning(args: argparse.Namespace, model, summary: str) -> str:
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"""\
{pages.origin()}:
{summary.replace(f"{ROOT}/", "")}; {size:,.0f} M weights.
A chat of {len(TOPICS)} questions, all of which stay in the context, with the likeliest answers of
at most {args.tokens} tokens; then the same questions as a file of prompts. The aim is a first token
within a second."""


def figures(waits: list[float], rate: float, rates: dict[int, float]) -> list[dict]:
    found = {
        "first token of the first answer": f"{waits[0]:.2f} s",
        "of later answers, median": f"{statistics.median(waits[1:]):.2f} s",
        "of later answers, longest": f"{max(waits[1:]):.2f} s",
        "the rest of an answer": f"{rate:.1f} tokens/s",
        **{f"a file of prompts, {n} at a time": f"{r:.1f} tokens/s" for n, r in rates.items()},
    }
    return [{"": name, " ": figure} for name, figure in found.items()]


def question(topic: str) -> str:
    return f"What should a child know about {topic}?"


if __name__ == "__main__":
    main(parse_args())
