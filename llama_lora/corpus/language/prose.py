"""The prose of a text: what is left without code, formulas and addresses."""

import re
from collections.abc import Iterator

FENCE = re.compile(r"[ \t>]*(?:[-*+] +|\d{1,9}[.)] +)*(`{3,}|~{3,})")
# It begins with a literal, so that the search can skip to it.
INLINE_CODE = re.compile(r"`(?<!``)(`{0,2})(?!`)[^`\n]+`\1(?!`)")
FORMULA = re.compile(
    r"\$\$[^$]+\$\$|\$(?! )[^$\n]+(?<! )\$(?!\d)|\\\(.{1,500}?\\\)|\\\[.{1,2000}?\\\]", re.S
)
ADDRESS = re.compile(r"(?:https?://|www\.)[^\s<>()\[\]]+|[\w.+-]{1,64}@[\w-]+\.[\w.-]+")
ADDRESS_SIGNS = "://", "www.", "@"
TAG = re.compile(r"</?[A-Za-z][^<>]{0,500}>")


def without_code(text: str) -> str:
    """`text` without fenced and inline code."""
    if "`" not in text and "~~~" not in text:
        return text
    return INLINE_CODE.sub(" ", without_fences(text))


def without_fences(text: str) -> str:
    """`text` without the lines of fenced code."""
    return "\n".join(line for line, code in fenced(text) if not code)


def fenced(text: str) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it belongs to fenced code; an open fence reaches to the end."""
    fence = ""
    for line in text.split("\n"):
        found = FENCE.match(line) if "```" in line or "~~~" in line else None
        yield line, bool(found or fence)
        if found:
            ticks = found[1]
            if not fence:
                fence = ticks
            elif ticks[0] == fence[0] and len(ticks) >= len(fence) and line.strip() == ticks:
                fence = ""


def prose(text: str) -> str:
    """`text` without code, formulas, addresses and tags."""
    text = without_code(text)
    for pattern, signs in ((FORMULA, ("$", "\\(", "\\[")), (ADDRESS, ADDRESS_SIGNS), (TAG, ("<",))):
        if any(sign in text for sign in signs):
            text = pattern.sub(" ", text)
    return text
