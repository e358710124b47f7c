"""Traditional Chinese to simplified, by OpenCC; code and addresses stay as they are."""

import re
from collections.abc import Callable
from functools import cache

from llama_lora.corpus.language.prose import ADDRESS, INLINE_CODE, fenced

TRADITIONAL = "zh-Hant"  # the detector's code
KEPT = re.compile(f"{INLINE_CODE.pattern}|{ADDRESS.pattern}")


def to_simplified(text: str) -> str:
    """`text` in simplified characters; outside of code and addresses it must all be Chinese."""
    return "\n".join(line if code else line_to_simplified(line) for line, code in fenced(text))


def line_to_simplified(line: str) -> str:
    convert, done, at = converter(), [], 0
    for kept in KEPT.finditer(line):
        done += convert(line[at : kept.start()]), kept[0]
        at = kept.end()
    return "".join(done) + convert(line[at:])


@cache
def converter() -> Callable[[str], str]:
    """OpenCC's conversion of characters alone: words of other regions are Chinese as well."""
    import opencc

    return opencc.OpenCC("t2s").convert
