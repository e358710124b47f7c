"""Write lengths.json: how long real conversations are, and how much of each is answer.

make .demo/base/config.json && python3 -m benchmarks.gpu.contenders.count_lengths

So that a machine without a network trains on pieces as long as real ones; their words do not matter
to a benchmark. Drawn are the very pieces that train_speed.py trains on, and whole conversations.
"""

import argparse
import json
from pathlib import Path

from benchmarks import training_runs as runs
from benchmarks.gpu.contenders import lengths

WINDOWS = 512, 1024, 2048, 4096
COUNT = 600  # of each


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--base", type=Path, default=runs.ROOT / ".demo/base", help="base whose tokenizer counts")
    add("--cache", type=Path, default=runs.ROOT / ".bench/training", help="folder for downloads")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    args.cache.mkdir(parents=True, exist_ok=True)
    chats, _ = runs.real_corpus(args.cache)
    drawn = {str(window): runs.pieces(chats, args.base, window, args.cache) for window in WINDOWS}
    drawn[lengths.WHOLE] = [
        item for item in json.loads(chats.read_text()) if not runs.has_system_turn(item)
    ]
    pairs = {name: measured(runs.draw(items, COUNT), args.base) for name, items in drawn.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(pairs[name])}" for name in pairs]
    lengths.FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for name, found in pairs.items():
        print(f"{name}: {len(found)}, {sum(tokens for tokens, _ in found):,} tokens")


def measured(items: list[dict], base: Path) -> list[tuple[int, int]]:
    """Tokens and labelled tokens of each item."""
    from llama_lora.model.labels import IGNORE
    from llama_lora.model.template import Template, load_tokenizer

    encoded = Template(load_tokenizer(base)).encode_batch(items)
    return [(len(one.ids), sum(label != IGNORE for label in one.labels)) for one in encoded]


if __name__ == "__main__":
    main(parse_args())
