"""Merge conversation files into one, whatever formats they come in.

python3 fastchat/data/merge.py --in data/dummy_en.json data/dummy_cn.json --out merged.json
"""

import argparse

from llama_lora.cli import one_line_errors
from llama_lora.corpus.duplicates import merge
from llama_lora.corpus.engine import stage
from llama_lora.corpus.engine.account import listed
from llama_lora.options import between, fraction


def parse_args() -> argparse.Namespace:
    parser = stage.parser(__doc__, several=True)
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="put them in a random order")
    parser.add_argument(
        "--limit", type=between(1, kind=int), metavar="N", help="keep the first N only"
    )
    parser.add_argument(
        "--split-eval",
        type=fraction,
        metavar="FRACTION",
        help="hold this share out, in a file beside the output (OUT.eval.json); conversations that "
        "are equal or alike stay on one side",
    )
    return parser.parse_args()


@one_line_errors
def main(args: argparse.Namespace) -> None:
    account = stage.run(args, merge.build, merge.arrangement(args))
    print("formats: " + listed(account.formats))
    if args.split_eval is not None:
        print(f"held out: {account.seen['held out']:,} in {merge.eval_path(args.out)}")
    print(account)


if __name__ == "__main__":
    main(parse_args())
