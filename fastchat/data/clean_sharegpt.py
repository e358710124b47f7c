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
        help="file of phrases, one per line, that no answer may contain outside code; an empty "
        "file blocks nothing (default: claims to be ChatGPT and the like)",
    )
    parser.add_argument(
        "--near-duplicates",
        type=fraction,
        metavar="SIMILARITY",
        help="also drop conversations at least this similar to one that is kept, such as 0.85; of "
        "two, the longer is kept. Similarity is the Jaccard similarity of their runs of five words "
        "(five characters in Chinese, Japanese or Thai), estimated with MinHash",
    )
    parser.add_argument(
        "--simplified-chinese",
        action="store_true",
        help="convert traditional Chinese to simplified, except in code",
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
