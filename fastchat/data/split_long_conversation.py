"""Split conversations into pieces that fit the length the model is trained at.

python3 fastchat/data/split_long_conversation.py --in kept.json --out split.json \\
    --model-name ./base --max-length 512
"""

import argparse
import os
import sys
from functools import partial

from llama_lora.cli import one_line_errors
from llama_lora.corpus.engine import stage
from llama_lora.options import between


def parse_args() -> argparse.Namespace:
    parser = stage.parser(__doc__)
    add = parser.add_argument
    add(
        "--model-name",
        "--model-name-or-path",
        dest="model",
        required=True,
        metavar="DIR",
        help="folder of the base model, for its tokenizer",
    )
    add("--max-length", type=between(1, kind=int), default=512, help="longest piece, in tokens")
    add(
        "--template",
        default="vicuna_v1.1",
        help="prompt template: vicuna_v1.1, or model (the base's own)",
    )
    add(
        "--overlong",
        choices=("continue", "truncate", "drop"),
        default="continue",
        help="what to do with an answer that is longer than a piece",
    )
    return parser.parse_args()


@one_line_errors
def main(args: argparse.Namespace) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    from llama_lora.corpus.split.splitter import Splitter
    from llama_lora.model.folder.config import beyond_positions

    if said := beyond_positions(args.model, "--max-length", args.max_length):
        print(f"warning: {said}", file=sys.stderr)
    build = partial(Splitter, args.model, args.max_length, args.template, args.overlong)
    print(stage.run(args, build))


if __name__ == "__main__":
    main(parse_args())
