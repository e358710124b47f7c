"""Turn ChatGPT's HTML into Markdown, repair conversations, and drop duplicates.

python3 fastchat/data/clean_sharegpt.py --in merged.json --out clean.json
"""

import argparse
from functools import partial

from llama_lora.cli import one_line_errors
from llama_lora.corpus import stage
from llama_lora.corpus.account import listed


def parse_args() -> argparse.Namespace:
    parser = stage.parser(__doc__)
    parser.add_argument(
        "--blocked-words",
        metavar="FILE",
        help="phrases that no answer may say outside of code, one a line; an empty file blocks "
        "nothing (default: claims to be ChatGPT and the like)",
    )
    return parser.parse_args()


@one_line_errors
def main(args: argparse.Namespace) -> None:
    from llama_lora.corpus.clean import Cleaner, blocked_phrases
    from llama_lora.corpus.dedupe import without_duplicates

    build = partial(Cleaner, blocked_phrases(args.blocked_words))
    account = stage.run(args, build, partial(without_duplicates, out=args.out))
    if account.seen:
        print(listed(account.seen))
    print(account)


if __name__ == "__main__":
    main(parse_args())
