"""Text that any UTF-8 file and any tokenizer can take."""

import re

SURROGATE = re.compile("[\ud800-\udfff]")


def sound_text(text: str) -> str:
    """`text` with halves of surrogate pairs joined where two make a pair, else as U+FFFD."""
    if text.isascii() or not SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
