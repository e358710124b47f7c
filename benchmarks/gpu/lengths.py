"""Write lengths.json: how long real conversations are, and how much of each is answer.

make .demo/base/config.json && PYTHONPATH=benchmarks python3 -m gpu.lengths

So that a machine without a network trains on pieces as long as real ones; their words do not matter
to a benchmark. Drawn are the very pieces that train_speed.py trains on, and whole conversations.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import training_runs as runs

FILE = Path(__file__).with_name("lengths.json")
WINDOWS = 512, 1024, 2048
WHOLE = "conversations"
COUNT = 600  # of each
SPECIAL = 3  # ids below are unk, bos and eos


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--base", type=Path, default=runs.ROOT / ".demo/base", help="whose tokenizer counts")
    add("--cache", type=Path, default=runs.ROOT / ".bench/training", help="for downloads")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    args.cache.mkdir(parents=True, exist_ok=True)
    chats, _ = runs.real_corpus(args.cache)
    drawn = {str(window): runs.pieces(chats, args.base, window, args.cache) for window in WINDOWS}
    drawn[WHOLE] = [
        item for item in json.loads(chats.read_text()) if not runs.has_system_turn(item)
    ]
    pairs = {name: measured(runs.draw(items, COUNT), args.base) for name, items in drawn.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(pairs[name])}" for name in pairs]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for name, found in pairs.items():
        print(f"{name}: {len(found)}, {sum(tokens for tokens, _ in found):,} tokens")


def measured(items: list[dict], base: Path) -> list[tuple[int, int]]:
    """Tokens and labelled tokens of each item."""
    from llama_lora.model.template import IGNORE, Template, load_tokenizer

    encoded = Template(load_tokenizer(base)).encode_batch(items)
    return [(len(one.ids), sum(label != IGNORE for label in one.labels)) for one in encoded]


class Pieces(list):
    """Examples of random tokens, as long and as labelled as real pieces of conversations."""

    @property
    def lengths(self) -> list[int]:
        return [len(piece.ids) for piece in self]

    @property
    def labelled(self) -> int:
        """Tokens to learn."""
        from llama_lora.model.template import IGNORE

        return sum(int((piece.labels != IGNORE).sum()) for piece in self)


def pieces(window: int, scale: int, words: int) -> Pieces:
    """The pieces of a window, `scale` times shorter, of a vocabulary of `words`."""
    draw = np.random.default_rng(0)
    pairs = json.loads(FILE.read_text())[str(window)]
    return Pieces(piece(max(2, a // scale), max(1, b // scale), words, draw) for a, b in pairs)


def piece(tokens: int, labelled: int, words: int, draw: np.random.Generator):
    """An `Example` whose last tokens are its answer."""
    from llama_lora.model.template import IGNORE
    from llama_lora.train.packing import Example

    ids = draw.integers(SPECIAL, words, tokens, dtype=np.int32)
    labels = ids.copy()
    labels[: tokens - labelled] = IGNORE
    return Example("", "", ids, labels)


def labelled_share() -> float:
    """Of the tokens of whole conversations."""
    pairs = np.array(json.loads(FILE.read_text())[WHOLE])
    return float(pairs[:, 1].sum() / pairs[:, 0].sum())


def within(tokens: int) -> float:
    """Share of whole conversations that are no longer than that."""
    pairs = np.array(json.loads(FILE.read_text())[WHOLE])
    return float((pairs[:, 0] <= tokens).mean())


if __name__ == "__main__":
    main(parse_args())
