"""ChatGPT's HTML back into the Markdown it was rendered from.

First everything that is not part of the answer is removed (see `chatgpt_html`). Then markdownify
walks the tree, with a hook for each element. Characters that could be markup stay hidden until it
is known where Markdown needs a backslash (see `escaping`). Code and formulas, which nothing may
touch, are put back last.
"""

import re
from functools import cache, lru_cache

from markdownify import MarkdownConverter

from llama_lora.corpus.clean.chatgpt_html import (
    ANSWER,
    QUESTION,
    Answer,
    Element,
    beside,
    is_chatgpt_html,
    outermost,
    parsed,
    text_of,
)
from llama_lora.corpus.clean.escaping import (
    CELL,
    ENTITY,
    MARK,
    MARK_END,
    MARKERS,
    ROW,
    hide,
    paired_brackets,
    resolve,
    resolve_block,
    without_reserved,
)

__all__ = ["is_chatgpt_html", "to_markdown"]

EMPHASIS = {"em", "i", "strong", "b"}
HEADINGS = {f"h{level}" for level in range(1, 7)}
# White space between these, and directly in them, is not shown.
INNER = {"p", "blockquote", "article", "div", "section", "ol", "ul", "li", "dl", "dt", "dd"}
INNER |= {"table", "thead", "tbody", "tfoot", "tr", "td", "th", *HEADINGS}
OUTER = INNER | {"pre", "hr"}
ALIGNMENT = {"left": ":---", "center": ":---:", "right": "---:"}
AUTOLINK = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,31}:[^\s<>]*")
MARKED = re.compile(f"{MARK}(\\d+){MARK_END}")
MARKED_LINE = re.compile(f"^({MARKERS.pattern}){MARK}(\\d+){MARK_END}$", re.MULTILINE)
LIST_MARKER = re.compile(r"[-*+]|\d+[.)]")
RUN_OF_TICKS = re.compile("`+")
SPACES = re.compile(r"[\t ]+")
SPACES_AROUND_END = re.compile(r"[\t \r\n]*[\r\n][\t \r\n]*")


def to_markdown(html: str) -> str:
    """The Markdown of the answers, or the plain text of a question, from ChatGPT's HTML.

    Raises `Rejected` if it cannot be parsed or is nested too deeply.
    """
    page = parsed(without_reserved(html))
    if answers := outermost(page, ANSWER):
        return "\n\n".join(filter(None, map(converter().markdown, answers)))
    return "\n\n".join(map(text_of, outermost(page, QUESTION)))


@cache
def converter() -> "Converter":
    """The one converter; making one takes longer than converting a short answer."""
    return Converter()


@lru_cache(maxsize=4096)
def tags_within(name: str, parent_tags: frozenset[str]) -> frozenset[str]:
    """What markdownify tells the hooks of all descendants of an element of that name."""
    inline = {"_inline"} if name in HEADINGS or name in ("td", "th") else set()
    return parent_tags | {name} | inline


class Converter(MarkdownConverter):
    """Converts one answer by `markdown`; the `convert_…` methods are markdownify's hooks."""

    class Options(MarkdownConverter.DefaultOptions):
        heading_style = "atx"
        sub_symbol = "<sub>"
        sup_symbol = "<sup>"
        strip = "video", "soup", "fn_cache"  # without their tags; markdownify would fail at them

    def markdown(self, answer) -> str:
        self.taken_out: list[str] = []
        self.ticks: set[int] = set()
        tree, lists = Answer(answer, self.mark).tree()
        number_items(lists)
        text = resolve(self.process_tag(tree, frozenset()).strip("\n"), self.ticks)
        if "\n\n\n" in text:
            text = re.sub(r"\n{3,}", "\n\n", text)
        if not self.taken_out:
            return text
        return MARKED.sub(lambda m: self.taken_out[int(m[1])], MARKED_LINE.sub(self.put_back, text))

    def mark(self, text: str) -> str:
        """A mark that stands for `text`."""
        self.taken_out.append(text)
        self.ticks.update(map(len, RUN_OF_TICKS.findall(text)))
        return f"{MARK}{len(self.taken_out) - 1}{MARK_END}"

    def put_back(self, match: re.Match) -> str:
        """Put a block back; in a list or quote, each of its lines gets the prefix."""
        first, *rest = self.taken_out[int(match[2])].split("\n")
        under = LIST_MARKER.sub(lambda marker: " " * len(marker[0]), match[1])
        return "\n".join([match[1] + first, *indented(rest, under)])

    # ------------------------------------------------------------------ markdownify's walk, leaner

    def process_tag(self, node, parent_tags=None):
        """The element as Markdown; where line ends meet, at most two are left."""
        inside = tags_within(node.name, parent_tags)
        pieces, ends = [], 0
        for place, child in enumerate(node.contents):
            if type(child) is str:
                text = self.process_text(child, node, place)
            else:
                text = self.process_tag(child, inside)
            if not text:
                continue
            body = text.lstrip("\n")
            starts = len(text) - len(body)
            if ends and starts:
                starts = min(2, max(starts, ends))
            else:
                starts += ends
            bare = body.rstrip("\n")
            ends = len(body) - len(bare)
            pieces += "\n" * starts, bare
        text = "".join(pieces) + "\n" * ends
        convert = self.get_conv_fn_cached(node.name)
        return text if convert is None else convert(node, text, parent_tags=parent_tags)

    def process_text(self, text, parent, place):
        """The text, hidden (see `escaping`), without white space that is not shown.

        It stands at `place` in the contents of `parent`.
        """
        before, after = beside(parent.contents, place)
        alone = parent.name in INNER
        starts = alone if before is None else before.name in OUTER
        ends = alone if after is None else after.name in OUTER
        if (starts or ends) and text.isspace():
            return ""
        if "\n" in text or "\r" in text:
            text = SPACES_AROUND_END.sub("\n", text)
        if "  " in text or "\t" in text:
            text = SPACES.sub(" ", text)
        text = hide(text)
        if starts:
            text = text.lstrip(" \t\r\n")
        return text.rstrip() if ends else text

    # ------------------------------------------------------------------ inline

    def convert_code(self, el, text, parent_tags):
        return text

    convert_kbd = convert_samp = convert_code

    def convert_em(self, el, text, parent_tags):
        return emphasised(text, "_" if underscore_needed(el, parent_tags) else "*")

    def convert_strong(self, el, text, parent_tags):
        return emphasised(text, "__" if parent_tags & {"b", "strong"} else "**")

    convert_i, convert_b = convert_em, convert_strong

    def convert_br(self, el, text, parent_tags):
        if parent_tags & {"td", "th"}:
            return "<br>"
        return " " if "_inline" in parent_tags else "  \n"

    def convert_a(self, el, text, parent_tags):
        href = el.attrs.get("href")
        if href is None:
            return text
        label = " ".join(text.split())
        if resolve_block(label, self.ticks, starts=False) == href and AUTOLINK.fullmatch(href):
            return self.mark(f"<{href}>")
        return f"[{paired_brackets(label)}]" + self.mark(target(href, el.attrs.get("title")))

    def convert_img(self, el, text, parent_tags):
        alt = paired_brackets(hide(" ".join(el.attrs.get("alt", "").split())))
        return f"![{alt}]" + self.mark(target(el.attrs.get("src", ""), el.attrs.get("title")))

    def convert_input(self, el, text, parent_tags):
        if el.attrs.get("type") != "checkbox":
            return ""
        return "[x]" if "checked" in el.attrs else "[ ]"

    # ------------------------------------------------------------------ blocks

    def block(self, el: Element, text: str, parent_tags) -> str:
        """`text` as a block between blank lines, except in the items of a tight list."""
        text = text.strip("\n")
        if not text.strip():
            return ""
        if "_inline" in parent_tags:
            return f" {text} "
        parent = el.parent
        tight = parent is not None and parent.name == "li" and not is_loose(parent)
        if tight and el.name == "table" and follows(el, {"ul", "ol"}):
            tight = False  # the item above would swallow the rows
        return f"\n{text}\n" if tight else f"\n\n{text}\n\n"

    def convert_p(self, el, text, parent_tags):
        return self.block(el, text.strip(), parent_tags)

    convert_pre = convert_div = convert_section = convert_article = convert_p

    def convert_hr(self, el, text, parent_tags):
        # "- ---" would be a rule, not an item.
        return self.block(el, "***" if "li" in parent_tags else "---", parent_tags)

    def convert_hN(self, n, el, text, parent_tags):
        text = resolve_block(" ".join(text.split()), self.ticks, starts=False)
        text = re.sub(r"(^|\s)(#+)$", r"\1\\\2", text)  # closing hashes would not be shown
        return self.block(el, f"{'#' * min(n, 6)} {text}".rstrip(), parent_tags)

    def convert_blockquote(self, el, text, parent_tags):
        lines = text.strip().split("\n")
        return self.block(el, "\n".join(indented(lines, "> ")), parent_tags)

    def convert_ul(self, el, text, parent_tags):
        return self.block(el, text, parent_tags - {"_inline"})

    convert_ol = convert_list = convert_ul

    def convert_li(self, el, text, parent_tags):
        first, *rest = text.strip().split("\n")
        marker = el.attrs.get("marker", "-")
        lines = [f"{marker} {first}".rstrip(" ") if not first else f"{marker} {first}"]
        lines += indented(rest, " " * (len(marker) + 1))
        around = "\n\n" if is_loose(el) else "\n"
        return around + "\n".join(lines) + around

    def convert_td(self, el, text, parent_tags):
        text = resolve_block(" ".join(text.split()), self.ticks, starts=False)
        text = MARKED.sub(lambda m: " ".join(self.taken_out[int(m[1])].split("\n")), text)
        return re.sub(r"(?<!\\)\|", r"\\|", text) + CELL

    convert_th = convert_td

    def convert_tr(self, el, text, parent_tags):
        return text.strip("\n") + ROW

    def convert_caption(self, el, text, parent_tags):
        return " ".join(text.split()) + CELL + ROW

    def convert_table(self, el, text, parent_tags):
        rows = [[cell.strip() for cell in row.split(CELL)[:-1]] for row in text.split(ROW)[:-1]]
        return self.block(el, "\n".join(table(el, rows)), parent_tags) if rows else text


def follows(el: Element, names: set[str]) -> bool:
    """Whether the element before `el` in its parent has one of the names."""
    before = element_before(el)
    return before is not None and before.name in names


def element_before(el: Element) -> Element | None:
    """The element before `el` in its parent, over any text."""
    before = el.place - 1
    while before >= 0 and type(el.parent.contents[before]) is str:
        before -= 1
    return el.parent.contents[before] if before >= 0 else None


def elements(contents: list[Element | str]) -> list[Element]:
    return [one for one in contents if type(one) is Element]


def number_items(lists: list[Element]) -> None:
    """Note on every item its marker, and whether its list is loose.

    Two lists in a row get different markers, or they would become one list.
    """
    for items in lists:
        second = follows(items, {items.name}) and "second" not in element_before(items).attrs
        if second:
            items.attrs["second"] = ""
        start = items.attrs.get("start", "1")
        number = int(start) if start.isascii() and start.isdigit() and len(start) < 10 else 1
        children = [child for child in elements(items.contents) if child.name == "li"]
        loose = any(part.name == "p" for child in children for part in elements(child.contents))
        for child in children:
            ordered = f"{number}{')' if second else '.'}"
            child.attrs["marker"] = ordered if items.name == "ol" else "*" if second else "-"
            if loose:
                child.attrs["loose"] = ""
            number += 1


def is_loose(item: Element) -> bool:
    """Whether blank lines separate the items of the list."""
    return "loose" in item.attrs


def indented(lines: list[str], prefix: str) -> list[str]:
    """The lines, each after `prefix`; blank ones without trailing spaces."""
    return [prefix + line if line else prefix.rstrip() for line in lines]


def emphasised(text: str, mark: str) -> str:
    """`text` between emphasis marks; white space at its ends stays outside."""
    inner = text.strip()
    if not inner or "\n\n" in inner:
        return text
    before, after = text[: text.index(inner[0])], text[len(text.rstrip()) :]
    return f"{before}{mark}{inner}{mark}{after}"


def underscore_needed(el: Element, parent_tags) -> bool:
    """Whether asterisks would merge with a neighbour's, and underscores would not."""
    before, after = beside(el.parent.contents, el.place)
    edge = el.parent.name in EMPHASIS and (before is None or after is None)
    neighbours = any(one.name in EMPHASIS for one in elements([before, after]))
    if not (edge or neighbours or parent_tags & {"em", "i"}):
        return False
    inside_word = (str(before)[-1:] if isinstance(before, str) else "").isalnum() or (
        str(after)[:1] if isinstance(after, str) else ""
    ).isalnum()
    return not inside_word


def target(href: str, title: str | None) -> str:
    """The part of a link or image in parentheses."""
    href = ENTITY.sub(lambda match: "&amp;" + match[0][1:], href.replace("\\", "%5C"))
    href = "".join(href.split("\n"))
    balanced = href.count("(") == href.count(")") and not re.search(r"\).*\(", href)
    if " " in href or not balanced or href.startswith("<") or (not href and title):
        href = "<" + href.replace("<", "%3C").replace(">", "%3E") + ">"
    if title:
        title = ENTITY.sub(lambda match: "&amp;" + match[0][1:], title.replace("\\", "\\\\"))
        return f'({href} "{" ".join(title.split()).replace(chr(34), chr(92) + chr(34))}")'
    return f"({href})"


def table(el: Element, rows: list[list[str]]) -> list[str]:
    """The lines of a table; its first row is the header if it is one in the HTML."""
    first = first_row(el)
    cells = (
        [cell for cell in elements(first.contents) if cell.name in ("th", "td")] if first else []
    )
    width = max(map(len, rows))
    rows = [row + [""] * (width - len(row)) for row in rows]
    if not (first and first.parent.name == "thead") and any(cell.name == "td" for cell in cells):
        rows.insert(0, [""] * width)
    rule = [ALIGNMENT.get(alignment(cell), "---") for cell in cells]
    rows.insert(1, rule + ["---"] * (width - len(rule)))
    return [f"| {' | '.join(row)} |" for row in rows]


def first_row(el: Element) -> Element | None:
    """The first row of a table, whichever part of the table it is in."""
    for child in elements(el.contents):
        if row := child if child.name == "tr" else first_row(child):
            return row
    return None


def alignment(cell: Element) -> str:
    """`left`, `center`, `right` or ""."""
    style = re.search(r"text-align:\s*(\w+)", cell.attrs.get("style", ""))
    return style[1] if style else cell.attrs.get("align", "")
