"""How soon an answer begins, how fast it goes on, and what batches make of it.

python3 benchmarks/first_token.py --base_model .demo/base --lora_weights .demo/adapter

A chat asks question after question, all of which stay in its context; the first token of each
answer is awaited. Then as many questions are answered one by one and in a batch.
"""

import argparse
import statistics
import time
from pathlib import Path

from machine import machine

TOPICS = ["rain", "bread", "trains", "glass", "bees", "chess", "salt", "clouds"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--base_model", type=Path, required=True, help="Hugging Face model folder")
    parser.add_argument("--lora_weights", type=Path, help="adapter folder")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer, at most")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    from llama_lora.chat.adapters import load
    from llama_lora.chat.sampling import Sampling

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sampling = Sampling(temperature=0, max_new_tokens=args.tokens)
    model, template, summary = load(args.base_model, args.lora_weights)
    print(f"{summary}\n{machine()}\n")
    waits, rate = chat(model, template, sampling)
    print(f"first token of the first answer  {waits[0]:.2f} s")
    print(f"of later ones, median            {statistics.median(waits[1:]):.2f} s")
    print(f"of later ones, longest           {max(waits[1:]):.2f} s")
    print(f"one answer                       {rate:.1f} tokens/s")
    for size in (1, len(TOPICS)):
        rate = batch(model, template, sampling, size)
        print(f"in batches of {size:<2}                 {rate:.1f} tokens/s")


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


def question(topic: str) -> str:
    return f"What should a child know about {topic}?"


if __name__ == "__main__":
    main(parse_args())
