"""Whether a held-out corpus holds what an adapter was trained on."""

import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

from llama_lora.model.labels import IGNORE
from llama_lora.train.data.example import Example
from llama_lora.train.data.examples import Examples, hold_out, load_examples


def training_examples(adapter: Path, template) -> Examples | None:
    """What the adapter in a folder was trained on; None if its summary names no file that exists.

    Args:
        template: the adapter's own, which its corpus was tokenized with.
    """
    summary = adapter / "summary.json"
    run = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    flags = run.get("settings", {})
    path = flags.get("data_path")
    if not path or not Path(path).is_file():
        return None
    examples, _ = load_examples(path, template, flags["model_max_length"], allow_truncation=True)
    ratio = flags["eval_ratio"]
    return hold_out(examples, ratio, flags["seed"])[0] if ratio else examples


def seen(examples: Examples, training: Examples) -> set[str]:
    """The conversations of `examples` that share a question and its answer with `training`."""
    where: dict[bytes, set[str]] = {}
    for example in all_of(examples):
        for pair in pairs(example):
            where.setdefault(pair, set()).add(example.source)
    found = (where.get(pair, ()) for example in all_of(training) for pair in pairs(example))
    return {source for sources in found for source in sources}


def all_of(examples: Examples) -> Iterator[Example]:
    return (examples[i] for i in range(len(examples)))


def pairs(example: Example) -> Iterator[bytes]:
    """Digests of the tokens from the end of each answer to the end of the next."""
    learned = np.append(example.labels != IGNORE, False)
    ends = np.flatnonzero(learned[:-1] & ~learned[1:]) + 1
    for start, end in zip([0, *ends], ends, strict=False):
        yield blake2b(example.ids[start:end].tobytes(), digest_size=8).digest()
