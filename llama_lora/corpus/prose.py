"""The prose of a text: what is left when code, formulas and addresses are set aside."""

import re

FENCE = re.compile(r"[ \t>]*(?:[-*+] +|\d{1,9}[.)] +)*(`{3,}|~{3,})")
INLINE_CODE = re.compile(r"(?<!`)(`{1,3})(?!`)[^`\n]+\1(?!`)")
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
    """`text` without the lines of fenced code; a fence that is not closed reaches to the end."""
    kept, fence = [], ""
    for line in text.split("\n"):
        if found := FENCE.match(line):
            ticks = found[1]
            if not fence:
                fence = ticks
            elif ticks[0] == fence[0] and len(ticks) >= len(fence) and line.strip() == ticks:
                fence = ""
        elif not fence:
            kept.append(line)
    return "\n".join(kept)


def prose(text: str) -> str:
    """`text` without code, formulas, addresses and tags."""
    text = without_code(text)
    for pattern, signs in ((FORMULA, ("$", "\\(", "\\[")), (ADDRESS, ADDRESS_SIGNS), (TAG, ("<",))):
        if any(sign in text for sign in signs):
            text = pattern.sub(" ", text)
    return text
