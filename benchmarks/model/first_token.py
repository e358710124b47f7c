"""How soon an answer begins, how fast it goes on, and what batches make of it.

make demo && python3 -m benchmarks.model.first_token --write

A chat asks question after question, all of which stay in its context; the first token of each
answer is awaited. Then as many questions are answered one by one and in a batch. Last, answers go
on after a short and a long prompt: the base's in each precision, with the adapter and without, and
with the adapter and the cache as the libraries have them.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path

from benchmarks import pages
from benchmarks.pages import ROOT

TOPICS = ["rain", "bread", "trains", "glass", "bees", "chess", "salt", "clouds"]
PROMPTS = 100, 1500  # tokens
ROUNDS = 5
ALONE, ADAPTED, PLAIN = "alone", "with the adapter", "the same as the libraries do it"


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

    from llama_lora.chat.adapters import load_adapters
    from llama_lora.chat.sampling import Sampling

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folders = {ADAPTED: args.lora_weights}
    adapters, summary = load_adapters(args.base_model, folders)
    asked = adapters.model, adapters.first, Sampling(temperature=0, max_new_tokens=args.tokens)
    waits, rate = chat(*asked)
    rates = {size: batch(*asked, size) for size in (1, len(TOPICS))}
    about = meaning(args, adapters.model, summary)
    del adapters, asked
    rows = []
    for quantization in pages.PRECISIONS:
        adapters, _ = load_adapters(args.base_model, folders, quantization)
        rows += by_way(adapters, quantization, args.tokens)
        del adapters
    pages.publish(
        args,
        "How soon an answer begins, and how fast it goes on",
        about,
        pages.table(figures(waits, rate, rates), left=1),
        WAYS,
        pages.table(rows, left=2),
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


def by_way(adapters, quantization: str, tokens: int) -> list[dict]:
    """A row for the base alone and for each way to use the adapter; they take turns."""
    ways = ALONE, ADAPTED, PLAIN
    rates = {pair: [] for pair in product(ways, PROMPTS)}
    for _ in range(ROUNDS):
        for way, length in rates:
            with used(adapters, way) as decoder:
                rates[way, length].append(rate_after(decoder, length, tokens))
    return [row(adapters, quantization, way, rates) for way in ways]


def row(adapters, quantization: str, way: str, rates: dict) -> dict:
    with used(adapters, way):
        counted = operators_of_one(adapters.model, max(PROMPTS))
    return {
        "base": quantization,
        "": way,
        **{f"tokens/s after {length:,}": f"{max(rates[way, length]):.1f}" for length in PROMPTS},
        "operators a token": f"{counted.names.total():,}",
        "of them casts": f"{counted.names['aten::_to_copy']:,}",
        "MB copied a token": f"{counted.copied / 1e6:.1f}",
    }


@contextmanager
def used(adapters, way: str) -> Iterator:
    """A decoder that answers in that way."""
    from llama_lora.chat.adapters import BASE

    name = BASE if way == ALONE else ADAPTED
    adapters.use(name)
    with as_the_libraries(adapters.model) if way == PLAIN else nullcontext():
        yield adapters.decoder(name)


@contextmanager
def as_the_libraries(model) -> Iterator[None]:
    """With the matrices in fp32, as peft loads them, and with transformers' own cache."""
    from transformers import DynamicCache

    from llama_lora.model import growing_cache

    matrices = [matrix for name, matrix in model.named_parameters() if ".lora_" in name]
    own, ours = [matrix.data for matrix in matrices], growing_cache.whole
    growing_cache.whole = lambda longest: DynamicCache()
    for matrix in matrices:
        matrix.data = matrix.data.float()
    try:
        yield
    finally:
        growing_cache.whole = ours
        for matrix, data in zip(matrices, own, strict=True):
            matrix.data = data


def rate_after(decoder, length: int, count: int) -> float:
    """Tokens a second after a prompt of this length and the first token; nothing ends them."""
    from llama_lora.chat.sampling import Sampling, generator

    decoder._stop_ids = set()
    sampling = Sampling(temperature=0, max_new_tokens=count)
    tokens = decoder.tokens(prompt(decoder.model, length), sampling, generator(decoder.model, 0))
    next(tokens)
    began = time.perf_counter()
    written = sum(1 for _ in tokens)
    return written / (time.perf_counter() - began)


def operators_of_one(model, length: int):
    """What runs for one token after a prompt of this length."""
    import torch

    from benchmarks.operators import Counted
    from llama_lora.model import growing_cache

    ids = torch.tensor([prompt(model, length)], device=model.device)
    cache = growing_cache.whole(length + 1)
    with torch.no_grad():  # in inference mode, torch tells operators made of others as one
        model(ids, past_key_values=cache, logits_to_keep=1)
        with Counted() as counted:
            model(ids[:, :1], past_key_values=cache)
    return counted


def prompt(model, length: int) -> list[int]:
    words = model.get_input_embeddings().weight.shape[0]
    return [number * 7919 % words for number in range(length)]


def meaning(args: argparse.Namespace, model, summary: str) -> str:
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"""\
{pages.origin()}:
{summary.replace(f"{ROOT}/", "").replace(ADAPTED, "adapter")}; {size:,.0f} M weights.
A chat of {len(TOPICS)} questions, all of which stay in the context, with the likeliest answers of
at most {args.tokens} tokens; then the same questions as a file of prompts. The aim is a first token
within a second."""


WAYS = f"""\
Below, an answer goes on after a prompt of so many tokens: the fastest of {ROUNDS} rounds in which
the rows of a base take turns. As the libraries do it: peft casts the adapter's matrices to fp32,
and so the input and the result of each product with them; transformers' cache copies all keys and
values to append a token. Here the matrices are in the base's dtype, and the cache grows 256 tokens
at a time. On a card, each operator is a launch or more, and what is copied takes its share of the
memory's bandwidth: a 7B has 23 times as much to copy. On a CPU, products of one token with small
matrices take longer in 16 bits than casting to fp32 does."""


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
