"""ChatGPT's page: which elements are answers, which are chrome, and which are code or formulas.

lxml parses and searches. What is left becomes light elements, which markdownify's hooks read as if
they were Beautiful Soup's.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from lxml import etree

from llama_lora.corpus.records.conversation import Rejected

DEEPEST = 150  # nested elements; no chat is deeper, and libxml2 drops what is deeper than 2,048

# The classes of the element that ChatGPT puts around an answer, and around a question. An answer's
# element has both of its classes: either alone is also in pages that people write and ask about.
ANSWER, QUESTION = {"markdown", "prose"}, {"whitespace-pre-wrap"}
# A `div` that is the wrapper of a question or answer, or has one near its beginning.
DIV_WITH = r'\s*(?=<div\b).{{0,4000}}?<div\b[^>]{{0,1000}}\bclass="{}'
CLASS = r'(?=[^"]{{0,1000}}(?<![^\s"]){}[\s"])'
WITH_ANSWER, WITH_QUESTION = (
    re.compile(DIV_WITH.format("".join(map(CLASS.format, parts))), re.DOTALL)
    for parts in (ANSWER, QUESTION)
)
BLOCKS = ["p", "pre", "ul", "ol", "table", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6"]
FORMULA = {"katex", "katex-display", "math-inline", "math-display"}
INVISIBLE = {"button", "svg", "script", "style"}
CODE = {"code", "kbd", "samp"}
# The elements whose attributes matter.
TOLD = {"a", "img", "input", "ol", "td", "th"}
LANGUAGE = re.compile(r"[\w+#.-]{1,30}")

too_deep = etree.XPath(f"boolean({'/*' * (DEEPEST + 3)})")  # html and body count
holds_markup = etree.XPath("boolean(.//*[not(self::div)])")
shown = etree.XPath(".//text()[normalize-space() and not(ancestor::button)]")


def is_chatgpt_html(text: str) -> bool:
    """Whether `text` is an element of ChatGPT's page: an answer, or one question and no more.

    Raises `Rejected` if it is nested too deeply to tell.
    """
    if not text.rstrip().endswith("</div>"):
        return False
    if WITH_ANSWER.match(text):
        return True
    return WITH_QUESTION.match(text) is not None and is_question(parsed(text))


def is_question(page: etree._Element) -> bool:
    """Whether the page shows nothing but the plain text of questions."""
    questions = outermost(page, QUESTION)
    if any(map(holds_markup, questions)):
        return False
    return len(shown(page)) == sum(len(shown(question)) for question in questions)


def parsed(html: str) -> etree._Element:
    """The root of the page; raises `Rejected` if it cannot be read or is nested too deeply."""
    try:
        root = etree.fromstring(html, parser())
    except etree.XMLSyntaxError as error:
        raise Rejected("HTML cannot be parsed", str(error)) from None
    if html.count("<") >= DEEPEST and too_deep(root):  # fewer tags cannot nest so deeply
        raise Rejected("HTML is nested too deeply", f"over {DEEPEST} elements")
    return root


@cache
def parser() -> etree.HTMLParser:
    # Without `huge_tree`, a text of more than 10 MB would silently end the page.
    return etree.HTMLParser(remove_comments=True, remove_pis=True, huge_tree=True)


def outermost(root: etree._Element, wanted: set[str]) -> list[etree._Element]:
    """The `div` elements with all `wanted` classes that are in no other such element."""
    found = dict.fromkeys(
        element for element in root.iter("div") if wanted.issubset(classes(element))
    )
    return [element for element in found if found.keys().isdisjoint(element.iterancestors())]


def text_of(element: etree._Element) -> str:
    """All the text in an element."""
    return etree.tostring(element, method="text", encoding=str, with_tail=False)


class Element:
    """An element with its parent, its place there, and its contents: elements, and runs of text."""

    __slots__ = ("attrs", "contents", "name", "parent", "place")

    def __init__(self, name: str, attrs: dict[str, str], parent: "Element | None"):
        self.name, self.attrs, self.parent = name, attrs, parent
        self.contents: list[Element | str] = []
        if parent is not None:
            self.place = len(parent.contents)
            parent.contents.append(self)


def beside(contents: list[Element | str], place: int) -> tuple[Element | str | None, ...]:
    """What stands before and after a place in the contents of an element."""
    before = contents[place - 1] if place else None
    after = contents[place + 1] if place + 1 < len(contents) else None
    return before, after


# ---- What is left of an answer ----


@dataclass
class Answer:
    """An answer without its chrome; `mark` returns a mark that stands for code or a formula."""

    root: etree._Element
    mark: Callable[[str], str]

    def tree(self) -> tuple[Element, list[Element]]:
        """The answer, and the lists in it, in order."""
        self.bars = bars(self.root)
        self.formulas = dict(formulas(self.root))
        self.lists: list[Element] = []
        root = Element("div", {}, None)
        self.add_contents(self.root, root)
        return root, self.lists

    def add_contents(self, source: etree._Element, target: Element) -> None:
        text = source.text or ""
        for child in source:
            if self.add(child, target, text):
                text = child.tail or ""
            else:
                text += child.tail or ""
        if text:
            target.contents.append(text)

    def add(self, source: etree._Element, target: Element, before: str) -> bool:
        """Add an element after the text before it, unless nothing is left of it."""
        name = source.tag
        if name in INVISIBLE or source in self.bars:
            return False
        if before:
            target.contents.append(before)
        if "katex-error" in source.get("class", ""):
            self.add_mark(target, f"${' '.join(text_of(source).split())}$", "code")
        elif source in self.formulas:
            self.add_mark(target, *self.formulas[source])
        elif name == "pre":
            self.add_mark(target, fenced(source), "pre")
        elif name in CODE:
            self.add_mark(target, code_span(text_of(source)), "code")
        else:
            made = Element(name, dict(source.attrib) if name in TOLD else {}, target)
            if name in ("ul", "ol"):
                self.lists.append(made)
            self.add_contents(source, made)
        return True

    def add_mark(self, target: Element, text: str, name: str) -> None:
        Element(name, {}, target).contents.append(self.mark(text))


def bars(root: etree._Element) -> set[etree._Element]:
    """Buttons outside code with the bars they stand in: pagers, "Copy code", counts of words."""
    found: set[etree._Element] = set()
    climbed: set[etree._Element] = set()  # searched, and without content
    contents: set[etree._Element] = set()  # with content
    for button in root.iter("button"):
        if next(button.iterancestors("pre"), None) is not None:
            continue
        bar = button
        for around in button.iterancestors():
            if around is root or around.tag not in ("div", "span") or around in contents:
                break
            if around not in climbed and next(around.iterdescendants(*BLOCKS), None) is not None:
                contents.add(around)
                break
            bar = around
            if around in climbed:
                break  # and so is everything around it
            climbed.add(around)
        found.add(bar)
    return found


def formulas(root: etree._Element) -> Iterator[tuple[etree._Element, tuple[str, str]]]:
    """Each formula's element, with the Markdown to put in its place and whether that is a block.

    KaTeX shows a formula two or three times; its source is in an annotation.
    """
    for source in root.iter("annotation"):
        if source.get("encoding") != "application/x-tex":
            continue
        above = list(source.iterancestors())
        above = above[: above.index(root)]
        around = [tag for tag in above if not FORMULA.isdisjoint(classes(tag))]
        outer = around[-1] if around else next((tag for tag in above if tag.tag == "math"), None)
        if outer is None:
            continue
        tex = re.sub(r"\n\s*\n", "\n", text_of(source).strip())
        if any("display" in name for tag in around for name in classes(tag)):
            yield outer, (f"$$\n{tex}\n$$", "pre")
        else:
            yield outer, (f"${' '.join(tex.split())}$", "code")


def classes(element: etree._Element) -> list[str]:
    return element.get("class", "").split()


def fenced(pre: etree._Element) -> str:
    """The code in `pre` between fences, with the language that its class or header names."""
    code = next(pre.iter("code"), None)
    text = text_of(pre if code is None else code)
    named = "" if code is None else language(pre, code, text)
    if text and not text.endswith("\n"):
        text += "\n"
    ticks = "`" * max(3, longest_run(text) + 1)
    return f"{ticks}{named}\n{text}{ticks}"


def language(pre: etree._Element, code: etree._Element, text: str) -> str:
    """The language of the code, or ""."""
    for name in classes(code):
        if name.startswith("language-"):
            return name.removeprefix("language-")
    header = next((text.strip() for text in shown(pre)), "")
    if text.lstrip().startswith(header):
        return ""  # there is no header: this is the code itself
    header = header.removesuffix("Copy code")
    return header if LANGUAGE.fullmatch(header) else ""


def code_span(text: str) -> str:
    """`text` as inline code."""
    text = text.replace("\n", " ")
    if not text:
        return ""
    ticks = "`" * (longest_run(text) + 1) if "`" in text else "`"
    pad = " " if text[0] == "`" or text[-1] == "`" or needs_padding(text) else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def needs_padding(text: str) -> bool:
    """Whether Markdown would strip a space from both ends."""
    return text[0] == text[-1] == " " and not text.isspace()


def longest_run(text: str) -> int:
    """The length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0) if "`" in text else 0
