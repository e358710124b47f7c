"""Turn ChatGPT's HTML into Markdown, repair conversations, and drop duplicates.

python3 fastchat/data/clean_sharegpt.py --in merged.json --out clean.json
"""

import argparse
from functools import partial

from llama_lora.cli import one_line_errors
from llama_lora.corpus.engine import stage
from llama_lora.corpus.engine.account import listed
from llama_lora.options import fraction


def parse_args() -> argparse.Namespace:
    parser = stage.parser(__doc__)
    parser.add_argument(
        "--blocked-words",
        metavar="FILE",
        help="phrases that no answer may say outside of code, one a line; an empty file blocks "
        "nothing (default: claims to be ChatGPT and the like)",
    )
    parser.add_argument(
        "--near-duplicates",
        type=fraction,
        metavar="SIMILARITY",
        help="also drop what is at least this similar to a conversation that stays, such as 0.85: "
        "the Jaccard similarity, which is the share of all runs of five words in the two (in "
        "Chinese, Japanese or Thai, of five characters) that both have, as MinHash estimates it; "
        "the longer one stays",
    )
    parser.add_argument(
        "--simplified-chinese",
        action="store_true",
        help="convert turns in traditional Chinese to simplified, code aside",
    )
    return parser.parse_args()


@one_line_errors
def main(args: argparse.Namespace) -> None:
    from llama_lora.corpus.clean.cleaner import Cleaner, blocked_phrases
    from llama_lora.corpus.duplicates.deduplicate import Deduplicator

    build = partial(Cleaner, blocked_phrases(args.blocked_words), args.simplified_chinese)
    account = stage.run(args, build, Deduplicator(args.out, args.near_duplicates))
    if account.seen:
        print(listed(account.seen))
    print(account)


if __name__ == "__main__":
    main(parse_args())
