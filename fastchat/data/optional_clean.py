"""Keep or skip conversations by their language.

python3 fastchat/data/optional_clean.py --in clean.json --out kept.json --keep-lang en zh
"""

import argparse
from functools import partial

from llama_lora.cli import one_line_errors
from llama_lora.corpus.engine import stage
from llama_lora.corpus.engine.account import listed
from llama_lora.corpus.language.filter import Filter, language_code, languages_read


def parse_args() -> argparse.Namespace:
    parser = stage.parser(__doc__)
    add = parser.add_argument
    codes = {"nargs": "+", "type": language_code, "default": [], "metavar": "CODE"}
    add("--keep-lang", **codes, help="keep only these languages, such as en es fr de it ja ko zh")
    help = "drop these languages; zh is all Chinese, zh-Hant only traditional Chinese"
    add("--skip-lang", **codes, help=help)
    help = "drop conversations with one digit nine times in a row"
    add("--reduce-rep", action="store_true", help=help)
    return parser.parse_args()


@one_line_errors
def main(args: argparse.Namespace) -> None:
    account = stage.run(args, partial(Filter, args.keep_lang, args.skip_lang, args.reduce_rep))
    print("languages: " + listed(languages_read(account)))
    print(account)


if __name__ == "__main__":
    main(parse_args())
