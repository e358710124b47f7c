"""Backslashes where Markdown needs them, and nowhere else.

While HTML is being converted, each character of its text that Markdown could read as markup is
replaced by a stand-in (`hide`), so that text and markup stay apart. Once a block is whole,
`resolve` decides for each stand-in, by the rules of CommonMark and of GitHub's tables and
strikethrough, whether the character would be read as markup where it stands.
"""

import re
import unicodedata
from collections.abc import Collection, Iterator
from functools import lru_cache
from html.entities import html5

# Unicode reserves these code points for a program's own use; no text holds them.
STAND_INS = {char: chr(0xFDD0 + number) for number, char in enumerate("\\`*_[]<>&#+-=~|!.)")}
CELL, ROW, MARK, MARK_END = map(chr, range(0xFDEC, 0xFDF0))
RESERVED = re.compile("[\ufdd0-\ufdef\0]")
STAND_IN = re.compile(f"[{''.join(STAND_INS.values())}]")

# Most characters matter only in certain places: a dot after a digit, a hyphen where a line may
# begin. The pattern begins with a set of characters, so that the search can skip to the next.
HIDDEN = re.compile(
    r"[\\`*_\[\]<>&~|!.)#+=-]"
    r"(?:(?<=[^.)#+=-])|(?<=[0-9][.)])|(?<=[#+=-])(?<![^\s=:|-].)|(?<=#)(?=#*$))"
)
BEHIND = {stand_in: char for char, stand_in in STAND_INS.items()}

MARKERS = re.compile(r"(?:> ?|[-*+] +|\d{1,9}[.)] +| )*")  # of quotes and list items
QUOTED = re.compile(r"(?<=\n)[ >]+")
ITEM = re.compile(r"[ >]*(?:[-*+]|\d{1,9}[.)]) ")
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{0,40});")
ATTRIBUTE = r"""\s+[A-Za-z_:][\w.:-]*(?:\s*=\s*(?:[^\s"'=<>`]+|'[^']*'|"[^"]*"))?"""
ANGLE = re.compile(
    rf"<(?:[A-Za-z][A-Za-z0-9-]*(?:{ATTRIBUTE})*\s*/?>|/[A-Za-z][A-Za-z0-9-]*\s*>|!--|\?|![A-Za-z]"
    r"|!\[CDATA\[|[A-Za-z][A-Za-z0-9+.-]{1,31}:[^\s<>]*>|[\w.!#$%&'*+/=?^`{|}~-]{1,64}@[\w.-]+>)"
)
CLOSINGS = {"<!--": "-->", "<?": "?>", "<![": "]]>", "<!": ">"}  # where ANGLE finds the start
# What begins a block of HTML whatever follows it (CommonMark, section 4.6).
HTML_BLOCKS = """address article aside base basefont blockquote body caption center col colgroup dd
details dialog dir div dl dt fieldset figcaption figure footer form frame frameset h1 h2 h3 h4 h5 h6
head header hr html iframe legend li link main menu menuitem nav noframes ol optgroup option p param
search section source summary table tbody td tfoot th thead title tr track ul"""
ANGLE_AT_START = re.compile(
    rf"</?(?:{'|'.join(HTML_BLOCKS.split())})(?:\s|/?>|$)"
    r"|<(?:script|pre|style|textarea)(?:\s|>|$)|<!--|<\?|<![A-Za-z]|<!\[CDATA\[",
    re.IGNORECASE,
)
HEADING = re.compile(r"#{1,6}(?:[ \t]|$)")
BULLET = re.compile(r"[-+*](?:[ \t]|$)")
NUMBER = re.compile(r"(\d{1,9})[.)](?:[ \t]|$)")
RULE = re.compile(r"([-*_])[ \t]*(?:\1[ \t]*){2,}$")
UNDERLINE = re.compile(r"(?:=+|-+)[ \t]*$")
FENCE = re.compile(r"(`{3,})[^`]*$|~~~")
TABLE_RULE = re.compile(r"(?=.*\|)\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$")
DEFINITION = re.compile(
    r"\[[^\[\]]+\]:\s*(?:[ >]*)(?:<[^<>\n]*>|[^\s<]\S*)"
    r"[ \t]*(?:\n|$|[ \t]+[\"'(](?s:.*)[\"')][ \t]*(?:\n|$))"
)
LINK_TAIL = re.compile(
    r"\]\(\s*(?:<[^<>\n]*>|[^\s<]\S{0,2000}?)?(?:\s+[\"'(][^\]]{0,2000}?[\"')])?\s*\)"
)
RUN = re.compile(r"\*+|_+|~+")
MOST_RUNS = 500  # beyond this, every run that could be a delimiter is escaped, to stay linear
PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def hide(text: str) -> str:
    """`text` with a stand-in for every character that could be markup."""
    return HIDDEN.sub(lambda match: STAND_INS[match[0]], text)


def without_reserved(text: str) -> str:
    """`text` without the code points that the stand-ins use."""
    return text if text.isascii() and "\0" not in text else RESERVED.sub("\ufffd", text)


def paired_brackets(label: str) -> str:
    """The text of a link, with its brackets escaped unless they are balanced."""
    opening, closing = STAND_INS["["], STAND_INS["]"]
    level = lowest = 0
    for char in label:
        level += (char == opening) - (char == closing)
        lowest = min(lowest, level)
    if level == lowest == 0:
        return label
    return label.replace(opening, "\\[").replace(closing, "\\]")


def resolve(text: str, ticks: Collection[int] = ()) -> str:
    """Markdown in which every stand-in is its character again, escaped where necessary.

    `ticks` are the lengths of the backtick runs in the code and formulas that marks stand for.
    """
    return "\n".join(resolve_block(block, ticks) for block in blocks(text))


def blocks(text: str) -> Iterator[str]:
    """The lines of `text` in blocks; no inline markup reaches across them."""
    block: list[str] = []
    for line in text.split("\n"):
        bare = line.lstrip(" >")
        if block and (not bare or bare[0] in "|#" or ITEM.match(line)):
            yield "\n".join(block)
            block = []
        block.append(line)
        if not bare or bare[0] in "|#":
            yield line
            block = []
    if block:
        yield "\n".join(block)


def resolve_block(block: str, ticks: Collection[int] = (), starts: bool = True) -> str:
    """`resolve` for one block; `starts` says whether its lines can start headings, lists …"""
    if not STAND_IN.search(block):
        return block
    kept = STAND_IN.sub(lambda match: BEHIND[match[0]], block)
    plain = kept.replace(MARK, "$").replace(MARK_END, "$")  # code and formulas are punctuation
    hidden = {match.start() for match in STAND_IN.finditer(block)}
    escaped = {*markup_characters(block, plain), *(line_starts(block, plain) if starts else ())}
    escaped &= hidden
    escaped.update(hidden.intersection(code_ticks(block, plain, ticks, escaped)))
    escaped |= delimiters(plain, hidden, escaped)
    pieces, last = [], 0
    for at in sorted(escaped):
        pieces += kept[last:at], "\\"
        last = at
    return "".join(pieces) + kept[last:]


def markup_characters(block: str, plain: str) -> Iterator[int]:
    """Where a single character makes markup: escapes, entities, tags, links, images, code."""
    if "\\" in plain:
        for match in re.finditer(r"\\(?=(.|\n)?)", plain):
            if match[1] == "\n" or (match[1] and match[1] in PUNCTUATION):
                yield match.start()
    if "&" in plain:
        for match in ENTITY.finditer(plain):
            if match[0][1] == "#" or match[0][1:] in html5:
                yield match.start()
    if "<" in plain:
        unquoted = QUOTED.sub(lambda found: " " * len(found[0]), block)  # ">" there ends no tag
        yield from tag_starts(STAND_IN.sub(lambda found: BEHIND[found[0]], unquoted))
    if "](" in plain:
        yield from link_ends(plain)
    if "![" in plain:
        last_link = block.rfind(f"]{MARK}")
        for match in re.finditer(STAND_INS["!"] + r"\[", block):
            if match.end() <= last_link:
                yield match.start()


def tag_starts(plain: str) -> Iterator[int]:
    """Where a tag begins, or a comment, instruction, declaration or section that is closed."""
    ends = {start: plain.rfind(end) for start, end in CLOSINGS.items()}
    for found in ANGLE.finditer(plain):
        opening = next(filter(found[0].startswith, CLOSINGS), None)
        if opening is None or ends[opening] >= found.start() + 2:  # "<!-->" is a comment
            yield found.start()


def link_ends(plain: str) -> Iterator[int]:
    """Where a bracket closes what would be read as the text of a link."""
    level = 0
    for match in re.finditer(r"[\[\]]", plain):
        if match[0] == "[":
            level += 1
        elif level:
            level -= 1
            if LINK_TAIL.match(plain, match.start()):
                yield match.start()


def code_ticks(
    block: str, plain: str, ticks: Collection[int], escaped: Collection[int]
) -> Iterator[int]:
    """Where backticks would begin code: an equally long run comes later, or they touch code.

    If the first of a run is in `escaped`, so that it begins no fence, only the rest counts.
    """
    if "`" not in plain:
        return
    last_mark = block.rfind(MARK) if ticks else -1
    later: set[int] = set()  # lengths of the runs after the present one; \\ does not end code
    for run in reversed(list(re.finditer("`+", plain))):
        start, end = run.span()
        at = start + (start in escaped)
        if ticks and block[start - 1 : start] == MARK_END:
            at += 1
        touches = last_mark == end
        while at < end and (
            touches or end - at in later or (end < last_mark and end - at in ticks)
        ):
            at += 1
        yield from range(start, at)
        later.add(min(end - start, end - at + 1))
        if at > start + 1:
            later.add(1)


def line_starts(block: str, plain: str) -> Iterator[int]:
    """Where a line of text would begin a heading, a quote, a list, a rule, a table or code."""
    at = 0
    for number, line in enumerate(block.split("\n")):
        start = at + MARKERS.match(line).end()
        text = plain[start : at + len(line)]
        at += len(line) + 1
        starts = HEADING, BULLET, RULE, FENCE, ANGLE_AT_START
        if text.startswith(">") or any(pattern.match(text) for pattern in starts):
            yield start
        found = NUMBER.match(text)
        if found and (number == 0 or found[1] == "1"):  # only a 1 interrupts a paragraph
            yield start + found.end(1)
        if number == 0 and text.startswith("[") and DEFINITION.match(plain, start):
            yield start
        if number > 0 and (UNDERLINE.match(text) or TABLE_RULE.match(text)):
            yield start + len(text) - len(text.lstrip(":"))


def delimiters(plain: str, hidden: set[int], escaped: set[int]) -> set[int]:
    """Where text has asterisks, underscores or tildes that would pair up as emphasis."""
    found: set[int] = set()
    if not any(plain[at] in "*_~" for at in hidden):
        return found
    for run in RUN.finditer(plain):
        if hidden.isdisjoint((run.start(), run.end() - 1)):  # between two characters of markup
            found.update(hidden.intersection(range(*run.span())))
    while True:
        runs = [run for run in delimiter_runs(plain, escaped | found) if run[3] or run[4]]
        if len(runs) > MOST_RUNS:
            return found | {at for run in runs for at in range(*run[1:3]) if at in hidden}
        # Without its opener, a closer is text too; often escaping one character of it is enough.
        pairs = (
            hidden.intersection(one) or hidden.intersection(two) for one, two in pairs_of(runs)
        )
        more = {min(pair) for pair in pairs if pair}
        if not more:
            return found
        found |= more


def delimiter_runs(plain: str, escaped: set[int]) -> Iterator[tuple[str, int, int, bool, bool]]:
    """The delimiter runs of CommonMark, section 6.2: character, start, end, can open, can close."""
    for start, end in unescaped(plain, escaped):
        before, after = char_class(plain[start - 1 : start]), char_class(plain[end : end + 1])
        left = after != " " and (after != "." or before != "a")
        right = before != " " and (before != "." or after != "a")
        if plain[start] == "_":
            opens, closes = (
                left and (not right or before == "."),
                right and (not left or after == "."),
            )
        else:
            opens, closes = left, right
        yield plain[start], start, end, opens, closes


def unescaped(plain: str, escaped: set[int]) -> Iterator[tuple[int, int]]:
    """Where runs of one delimiter are; an escaped delimiter splits a run."""
    for match in RUN.finditer(plain):
        start = match.start()
        for at in range(*match.span()):
            if at in escaped:
                if start < at:
                    yield start, at
                start = at + 1
        if start < match.end():
            yield start, match.end()


@lru_cache(maxsize=4096)
def char_class(char: str) -> str:
    """Its class: " " for space or nothing, "." for punctuation, "a" for anything else."""
    if not char or char.isspace():
        return " "
    return "." if unicodedata.category(char)[0] in "PS" else "a"


def pairs_of(runs: list[tuple[str, int, int, bool, bool]]) -> Iterator[tuple[range, range]]:
    """The characters that pair up as emphasis or strikethrough (CommonMark's appendix)."""
    starts, ends = [run[1] for run in runs], [run[2] for run in runs]  # of what is left
    openers: list[int] = []
    for closer, (char, _, _, opens, closes) in enumerate(runs):
        while closes and starts[closer] < ends[closer]:
            opener = next(
                (
                    number
                    for number in reversed(openers)
                    if runs[number][0] == char and fits(runs[number], runs[closer])
                ),
                None,
            )
            if opener is None:
                break
            left = min(ends[opener] - starts[opener], ends[closer] - starts[closer])
            used = 2 if left > 1 else 1
            yield (
                range(ends[opener] - used, ends[opener]),
                range(starts[closer], starts[closer] + used),
            )
            ends[opener] -= used
            starts[closer] += used
            del openers[openers.index(opener) + 1 :]
            if starts[opener] == ends[opener]:
                openers.pop()
        if opens and starts[closer] < ends[closer]:
            openers.append(closer)


def fits(opener, closer) -> bool:
    """The "multiple of 3" rule for runs that both open and close; tildes pair by ones or twos."""
    char, start, end, _, closes = opener
    size, other = end - start, closer[2] - closer[1]
    if char == "~":
        return size == other or min(size, other) > 1
    return not ((closes or closer[3]) and (size + other) % 3 == 0 and (size % 3 or other % 3))
