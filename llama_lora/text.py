"""Text that any UTF-8 file and any tokenizer can take, and that stays on one line."""

import re

SURROGATE = re.compile("[\ud800-\udfff]")


def sound_text(text: str) -> str:
    """`text` with its surrogates joined where two make a pair, else replaced by U+FFFD."""
    if text.isascii() or not SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def brief(error: BaseException) -> str:
    """A library's error message on one line: its first two lines, without the details below."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]


def cause(error: BaseException) -> str:
    """A library's error message about a folder; in our own words if it wants to run code."""
    if "trust_remote_code" not in str(error):
        return str(error)
    return "it asks for Python code of its own (auto_map), and code in a folder is never run"


def named(tensors) -> str:
    """Tensors by their names, the first three of many: "the tensors a, b, c and 9 more"."""
    names = sorted(tensors)
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"the tensor{'s' * (len(names) > 1)} {', '.join(names[:3])}{more}"
