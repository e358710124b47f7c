"""Merge conversation files of any supported format into one.

python3 fastchat/data/merge.py --in data/dummy_en.json data/dummy_cn.json --out merged.json
"""

import argparse

from llama_lora.cli import one_line_errors
from llama_lora.corpus.duplicates import merge
from llama_lora.corpus.engine import stage
from llama_lora.corpus.engine.account import listed
from llama_lora.hardware.device import cores
from llama_lora.options import between, fraction


def parse_args() -> argparse.Namespace:
    parser = stage.parser(__doc__, several=True)
    parser.set_defaults(workers=None)
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle the conversations")
    parser.add_argument(
        "--limit", type=between(1, kind=int), metavar="N", help="keep only the first N"
    )
    parser.add_argument(
        "--split-eval",
        type=fraction,
        metavar="FRACTION",
        help="hold out this share in OUT.eval.json, beside the output; equal or similar "
        "conversations stay on the same side",
    )
    return parser.parse_args()


@one_line_errors
def main(args: argparse.Namespace) -> None:
    if args.workers is None:  # copying is faster than handing conversations to other processes
        args.workers = 1 if args.split_eval is None else cores()
    account = stage.run(args, merge.build, merge.arrangement(args))
    print("formats: " + listed(account.formats))
    if args.split_eval is not None:
        print(f"held out: {account.seen['held out']:,} in {merge.eval_path(args.out)}")
    print(account)


if __name__ == "__main__":
    main(parse_args())
