"""Look at a corpus file: what is in it, what training makes of it, and how it was made.

python3 fastchat/data/inspect_data.py --in split.json --model-name ./base --html report.html
python3 fastchat/data/inspect_data.py --in split.json --model-name ./base --show 0
"""

import argparse
import os
from contextlib import ExitStack

from llama_lora.cli import one_line_errors
from llama_lora.corpus.engine import stage
from llama_lora.options import between


def parse_args() -> argparse.Namespace:
    parser = stage.parser(__doc__, writes=False)
    add = parser.add_argument
    add(
        "--model-name",
        "--model-name-or-path",
        dest="model",
        metavar="DIR",
        help="folder of the base model, for its tokenizer; without it tokens are not counted",
    )
    add(
        "--max-length",
        type=between(1, kind=int),
        default=512,
        help="longest example in training, in tokens",
    )
    add(
        "--template",
        default="vicuna_v1.1",
        help="prompt template: vicuna_v1.1, or model (the base's own)",
    )
    add(
        "--show",
        metavar="N|ID",
        help="print one conversation, by its number from 0 or its id, with what is learned in "
        "colour",
    )
    add("--html", metavar="FILE", help="also write the report as one HTML page")
    add(
        "--sample",
        type=between(0, kind=int),
        default=1000,
        metavar="N",
        help="show at most N conversations on that page, chosen at random",
    )
    return parser.parse_args()


@one_line_errors
def main(args: argparse.Namespace) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers keep the cores busy
    from llama_lora.report import statistics, terminal
    from llama_lora.report.conversation_view import find
    from llama_lora.report.html_page import opened

    if args.show is not None:
        print(terminal.shown(find(args, args.show), terminal.in_colour()))
        return
    with ExitStack() as stack:
        write = opened(args, stack) if args.html else None
        found = statistics.take(args)
        print(terminal.summary(found, args.max_length))
        if write:
            write(found)
    if args.html:
        print(f"\n{args.html}: {os.path.getsize(args.html) / 1e6:.1f} MB")


if __name__ == "__main__":
    main(parse_args())
