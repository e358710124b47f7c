"""ChatGPT's HTML back into the Markdown it was rendered from.

The tree is prepared first: chrome goes by where it stands, and code and formulas are taken out so
that nothing can touch them. markdownify then walks the tree. The text's own characters travel
hidden until it is known where Markdown needs a backslash (see `escaping`), and what was taken out
goes back in last.
"""

import re
from collections import defaultdict
from collections.abc import Collection
from functools import cache

from bs4 import BeautifulSoup, Tag
from bs4.builder import ParserRejectedMarkup
from markdownify import MarkdownConverter

from llama_lora.corpus.conversation import Rejected
from llama_lora.corpus.escaping import (
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

Tags = dict[str, list[Tag]]  # by their name, in document order

DEEPEST = 150  # nested elements; no chat is deeper, and libxml2 loses what is deeper than 256

# The classes of what ChatGPT puts around an answer and around a question.
ANSWER, QUESTION = {"markdown", "prose"}, {"whitespace-pre-wrap"}
WRAPPED = re.compile(
    r'\s*<div\b.{0,4000}?\bclass="[^"]*(?<![\w-])(?:markdown|prose|whitespace-pre-wrap)(?![\w-])',
    re.DOTALL,
)
TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
BLOCKS = ["p", "pre", "ul", "ol", "table", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6"]
CODE = ["code", "kbd", "samp"]
FORMULA = {"katex", "katex-display", "math-inline", "math-display"}
EMPHASIS = {"em", "i", "strong", "b"}
ALIGNMENT = {"left": ":---", "center": ":---:", "right": "---:"}
LANGUAGE = re.compile(r"[\w+#.-]{1,30}")
AUTOLINK = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,31}:[^\s<>]*")
MARKED = re.compile(f"{MARK}(\\d+){MARK_END}")
MARKED_LINE = re.compile(f"^({MARKERS.pattern}){MARK}(\\d+){MARK_END}$", re.MULTILINE)
LIST_MARKER = re.compile(r"[-*+]|\d+[.)]")


def is_chatgpt_html(text: str) -> bool:
    """Whether `text` is an element of ChatGPT's page, told by its wrapper."""
    return text.rstrip().endswith("</div>") and WRAPPED.match(text) is not None


def to_markdown(html: str) -> str:
    """The Markdown of an answer, or the plain text of a question, from ChatGPT's HTML.

    Raises `Rejected` if it cannot be parsed or is nested too deeply.
    """
    if depth(html) > DEEPEST:
        raise Rejected("HTML is nested too deeply", f"over {DEEPEST} elements")
    try:
        soup = BeautifulSoup(without_reserved(html), "lxml", element_classes={Tag: Element})
    except ParserRejectedMarkup as error:
        raise Rejected("HTML cannot be parsed", str(error)) from None
    tags = tags_of(soup)
    answers = outermost(tags, ANSWER)
    if not answers and (questions := outermost(tags, QUESTION)):
        return "\n\n".join(question.get_text() for question in questions)
    return "\n\n".join(filter(None, map(converter().markdown, answers or [soup])))


def depth(html: str) -> int:
    """How deep elements are nested."""
    deepest = level = 0
    for closes, name in TAG.findall(html):
        if name.lower() not in VOID:
            level += -1 if closes else 1
            deepest = max(deepest, level)
    return deepest


def tags_of(root: Tag) -> list[Tag]:
    """All elements in `root`, in document order."""
    return [node for node in root.descendants if isinstance(node, Tag)]


def outermost(tags: list[Tag], classes: set[str]) -> list[Tag]:
    """The elements with one of `classes` that are in no other such element."""
    found = [tag for tag in tags if not classes.isdisjoint(tag.get("class", ()))]
    ids = {id(tag) for tag in found}
    return [tag for tag in found if not any(id(parent) in ids for parent in tag.parents)]


@cache
def converter() -> "Converter":
    """The one converter; making one takes longer than converting a short answer."""
    return Converter()


class Element(Tag):
    """An element that finds a parent by name at once; markdownify looks for one of every element,
    and in the general way that takes as long as all the rest of the conversion."""

    def find_parent(self, name=None, *args, **kwargs):
        return next((parent for parent in self.parents if parent.name == name), None)


class Converter(MarkdownConverter):
    """Converts one element by `markdown`; the other methods are markdownify's hooks."""

    class Options(MarkdownConverter.DefaultOptions):
        heading_style = "atx"
        sub_symbol = "<sub>"
        sup_symbol = "<sup>"

    def markdown(self, root: Tag) -> str:
        self.taken_out: list[str] = []
        tags = defaultdict(list)
        for tag in tags_of(root):
            tags[tag.name].append(tag)
        remove_chrome(root, tags)
        self.take_out_formulas(root, tags)
        self.take_out_code(tags)
        number_items(tags)
        text = resolve(self.process_tag(root, parent_tags=set()).strip("\n"))
        text = re.sub(r"\n{3,}", "\n\n", text)
        return MARKED.sub(lambda m: self.taken_out[int(m[1])], MARKED_LINE.sub(self.put_back, text))

    # ------------------------------------------------------------------ what no rule may touch

    def mark(self, text: str) -> str:
        """A mark in the place of `text`."""
        self.taken_out.append(text)
        return f"{MARK}{len(self.taken_out) - 1}{MARK_END}"

    def take_out(self, element: Tag, text: str, block: bool = False) -> None:
        """Leave nothing in `element` but a mark for `text`.

        It stays where it is: to find a place among siblings, Beautiful Soup looks through them all.
        """
        element.clear(decompose=True)
        element.name = "pre" if block else "code"
        element.string = self.mark(text)

    def take_out_formulas(self, root: Tag, tags: Tags) -> None:
        """KaTeX shows a formula two or three times; its source is in an annotation."""
        for source in tags["annotation"]:
            if source.decomposed or source.get("encoding") != "application/x-tex":
                continue
            around = [tag for tag in source.parents if FORMULA & set(tag.get("class", ()))]
            outer = around[-1] if around else source.find_parent("math")
            if outer is None or any(outer is tag for tag in (root, *root.parents)):
                continue
            tex = re.sub(r"\n\s*\n", "\n", source.get_text().strip())
            if any("display" in name for tag in around for name in tag["class"]):
                self.take_out(outer, f"$$\n{tex}\n$$", block=True)
            else:
                self.take_out(outer, f"${' '.join(tex.split())}$")
        for error in tags["span"]:
            if not error.decomposed and "katex-error" in error.get("class", ()):
                self.take_out(error, f"${' '.join(error.get_text().split())}$")

    def take_out_code(self, tags: Tags) -> None:
        for pre in tags["pre"]:
            if not pre.decomposed and not is_within(pre, ["pre"]):
                self.take_out(pre, fenced(pre), block=True)
        for code in tags["code"] + tags["kbd"] + tags["samp"]:
            if not code.decomposed and not is_within(code, [*CODE, "pre"]):
                self.take_out(code, code_span(code.get_text()))

    def put_back(self, match: re.Match) -> str:
        """A block in its place: within lists and quotes, all its lines stand in them."""
        first, *rest = self.taken_out[int(match[2])].split("\n")
        under = LIST_MARKER.sub(lambda marker: " " * len(marker[0]), match[1])
        return "\n".join([match[1] + first, *indented(rest, under)])

    # ------------------------------------------------------------------ inline

    def process_text(self, el, parent_tags=None):
        # markdownify drops the white space around blocks, but not that around rules.
        if el.isspace() and "hr" in (name_of(el.previous_sibling), name_of(el.next_sibling)):
            return ""
        return super().process_text(el, parent_tags)

    def escape(self, text, parent_tags):
        return hide(text)

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
        href = el.get("href")
        if href is None:
            return text
        label = " ".join(text.split())
        if resolve_block(label, starts=False) == href and AUTOLINK.fullmatch(href):
            return self.mark(f"<{href}>")
        return f"[{paired_brackets(label)}]" + self.mark(target(href, el.get("title")))

    def convert_img(self, el, text, parent_tags):
        alt = paired_brackets(hide(" ".join(el.get("alt", "").split())))
        return f"![{alt}]" + self.mark(target(el.get("src", ""), el.get("title")))

    def convert_input(self, el, text, parent_tags):
        if el.get("type") != "checkbox":
            return ""
        return "[x]" if el.has_attr("checked") else "[ ]"

    # ------------------------------------------------------------------ blocks

    def block(self, el: Tag, text: str, parent_tags) -> str:
        """`text` as a block: apart by blank lines, but for the items of a tight list."""
        text = text.strip("\n")
        if not text.strip():
            return ""
        if "_inline" in parent_tags:
            return f" {text} "
        parent = el.parent
        tight = parent is not None and parent.name == "li" and not is_loose(parent)
        if tight and el.name == "table" and follows(el, ["ul", "ol"]):
            tight = False  # the item above would swallow the rows
        return f"\n{text}\n" if tight else f"\n\n{text}\n\n"

    def convert_p(self, el, text, parent_tags):
        return self.block(el, text.strip(), parent_tags)

    convert_pre = convert_div = convert_section = convert_article = convert_p

    def convert_hr(self, el, text, parent_tags):
        # "- ---" would be a rule and no item.
        return self.block(el, "***" if "li" in parent_tags else "---", parent_tags)

    def convert_hN(self, n, el, text, parent_tags):
        text = resolve_block(" ".join(text.split()), starts=False)
        text = re.sub(r"(^|\s)(#+)$", r"\1\\\2", text)  # closing hashes would not be shown
        return self.block(el, f"{'#' * min(n, 6)} {text}".rstrip(), parent_tags)

    def convert_blockquote(self, el, text, parent_tags):
        lines = text.strip().split("\n")
        return self.block(el, "\n".join(indented(lines, "> ")), parent_tags)

    def convert_ul(self, el, text, parent_tags):
        return self.block(el, text, parent_tags - {"_inline"})

    convert_ol = convert_ul

    def convert_li(self, el, text, parent_tags):
        first, *rest = text.strip().split("\n")
        marker = el.get("data-marker", "-")
        lines = [f"{marker} {first}".rstrip(" ") if not first else f"{marker} {first}"]
        lines += indented(rest, " " * (len(marker) + 1))
        around = "\n\n" if is_loose(el) else "\n"
        return around + "\n".join(lines) + around

    def convert_td(self, el, text, parent_tags):
        text = resolve_block(" ".join(text.split()), starts=False)
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


def name_of(node) -> str | None:
    """The name of an element; nothing for text."""
    return getattr(node, "name", None)


def is_within(el: Tag, names: Collection[str]) -> bool:
    """Whether `el` is in an element with one of the names."""
    return any(parent.name in names for parent in el.parents)


def follows(el: Tag, names: Collection[str]) -> bool:
    """Whether the element before `el` in its parent has one of the names."""
    before = el.find_previous_sibling()
    return before is not None and before.name in names


def remove_chrome(root: Tag, tags: Tags) -> None:
    """Empty buttons and the bars they stand in: pagers, "Copy code", counts of words."""
    for button in tags["button"]:
        if button.decomposed:
            continue
        bar = button
        while bar.parent is not root and bar.parent.name in ("div", "span"):
            if bar.parent.find(BLOCKS) or is_within(bar, ["pre"]):
                break
            bar = bar.parent
        empty(bar)
    for name in ("svg", "script", "style"):
        for tag in tags[name]:
            if not tag.decomposed:
                empty(tag)


def empty(el: Tag) -> None:
    """Make nothing of an element."""
    el.clear(decompose=True)
    el.name = "script"


def fenced(pre: Tag) -> str:
    """The code in `pre` between fences, with the language its class or its header names."""
    code = pre.find("code")
    text = (code or pre).get_text()
    if text and not text.endswith("\n"):
        text += "\n"
    ticks = "`" * max(3, longest_run(text) + 1)
    return f"{ticks}{language(pre, code)}\n{text}{ticks}"


def language(pre: Tag, code: Tag | None) -> str:
    """The language of the code, or nothing."""
    if code is None:
        return ""
    for name in code.get("class", ()):
        if name.startswith("language-"):
            return name.removeprefix("language-")
    header = next((text for text in pre.stripped_strings), "")
    if code.get_text().lstrip().startswith(header):
        return ""  # there is no header: this is the code itself
    header = header.removesuffix("Copy code")
    return header if LANGUAGE.fullmatch(header) else ""


def code_span(text: str) -> str:
    """`text` as inline code."""
    text = " ".join(text.split("\n"))
    if not text:
        return ""
    ticks = "`" * (1 if longest_run(text) == 0 else longest_run(text) + 1)
    pad = " " if text[0] == "`" or text[-1] == "`" or needs_padding(text) else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def needs_padding(text: str) -> bool:
    """Whether Markdown would take a space off both ends."""
    return text[0] == text[-1] == " " and not text.isspace()


def longest_run(text: str) -> int:
    """The length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def number_items(tags: Tags) -> None:
    """Note on every item its marker and whether its list is loose.

    The second of two lists in a row has other markers, or they would be one list.
    """
    for items in tags["ul"] + tags["ol"]:
        if items.decomposed:
            continue
        second = follows(items, [items.name])
        second = second and not items.find_previous_sibling().has_attr("data-second")
        if second:
            items["data-second"] = ""
        start = items.get("start", "1")
        number = int(start) if start.isascii() and start.isdigit() and len(start) < 9 else 1
        children = [child for child in items.children if child.name == "li"]
        loose = any(part.name == "p" for child in children for part in child.children)
        for child in children:
            ordered = f"{number}{')' if second else '.'}"
            child["data-marker"] = ordered if items.name == "ol" else "*" if second else "-"
            if loose:
                child["data-loose"] = ""
            number += 1


def is_loose(item: Tag) -> bool:
    """Whether the items of the list stand apart by blank lines."""
    return item.has_attr("data-loose")


def indented(lines: list[str], prefix: str) -> list[str]:
    """The lines after `prefix`; a blank one has no spaces at its end."""
    return [prefix + line if line else prefix.rstrip() for line in lines]


def emphasised(text: str, mark: str) -> str:
    """`text` between marks that stand next to what is no white space."""
    inner = text.strip()
    if not inner or "\n\n" in inner:
        return text
    before, after = text[: text.index(inner[0])], text[len(text.rstrip()) :]
    return f"{before}{mark}{inner}{mark}{after}"


def underscore_needed(el: Tag, parent_tags) -> bool:
    """Whether asterisks would run together with those of a neighbour, and underscores would not."""
    before, after = el.previous_sibling, el.next_sibling
    edge = el.parent.name in EMPHASIS and (before is None or after is None)
    neighbours = any(isinstance(tag, Tag) and tag.name in EMPHASIS for tag in (before, after))
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


def table(el: Tag, rows: list[list[str]]) -> list[str]:
    """The lines of a table; the first row is its head if it is one in the HTML."""
    first = el.find("tr")
    cells = first.find_all(["th", "td"], recursive=False) if first else []
    width = max(map(len, rows))
    rows = [row + [""] * (width - len(row)) for row in rows]
    if not (first and first.parent.name == "thead") and any(cell.name == "td" for cell in cells):
        rows.insert(0, [""] * width)
    rule = [ALIGNMENT.get(alignment(cell), "---") for cell in cells]
    rows.insert(1, rule + ["---"] * (width - len(rule)))
    return [f"| {' | '.join(row)} |" for row in rows]


def alignment(cell: Tag) -> str:
    """`left`, `center`, `right` or nothing."""
    style = re.search(r"text-align:\s*(\w+)", cell.get("style", ""))
    return style[1] if style else cell.get("align", "")
