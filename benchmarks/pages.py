"""A benchmark's page in docs/: the flag that writes it, where its figures are from, its tables."""

import argparse
import re
import sys
from pathlib import Path
from textwrap import fill

from benchmarks.machine import machine
from llama_lora.options import Help

ROOT = Path(__file__).parents[1]
START, END = "<!-- {} writes from here -->", "<!-- to here -->"
PRECISIONS = {"8bit": "int8", "4bit": "NF4", "none": "16-bit"}  # --quantization, and in tables


def parser(doc: str, page: str) -> argparse.ArgumentParser:
    """A parser with what `publish` reads of its arguments.

    Args:
        doc: of the benchmark's module.
        page: that it writes, by its name in docs/.
    """
    told = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=Help)
    told.add_argument("--write", action="store_true", help=f"also write docs/{page}")
    told.set_defaults(page=ROOT / "docs" / page)
    return told


def publish(args: argparse.Namespace, title: str, *parts: str) -> None:
    """Print a page of paragraphs and tables, and with --write replace the one in docs/."""
    text = "\n\n".join([f"# {title}", *map(wrapped, parts)])
    print(text)
    if args.write:
        args.page.write_text(text + "\n", encoding="utf-8")


def publish_part(args: argparse.Namespace, *parts: str) -> None:
    """The same for a page of which only what stands between this command's marks is measured."""
    text = "\n\n".join(map(wrapped, parts))
    print(text)
    if args.write:
        start = START.format(Path(sys.argv[0]).name)
        before, rest = args.page.read_text(encoding="utf-8").split(start)
        after = rest.split(END, 1)[1]
        args.page.write_text(f"{before}{start}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def publish_section(args: argparse.Namespace, title: str, *parts: str) -> None:
    """The same for one section of a page, up to the next heading; a new one becomes the last."""
    text = "\n\n".join([f"## {title}", *map(wrapped, parts)])
    print(text)
    if args.write:
        page = args.page.read_text(encoding="utf-8")
        old = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", page, re.M | re.S)
        start, end = old.span() if old else (len(page), len(page))
        parts = page[:start].rstrip(), text, page[end:].rstrip()
        args.page.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def wrapped(part: str) -> str:
    """The paragraphs of a text in lines of one length; headings, tables and fences as they are."""
    if part.startswith("```"):
        return part
    return "\n\n".join(
        paragraph
        if paragraph.startswith(("#", "|"))
        else fill(paragraph, 100, break_on_hyphens=False, break_long_words=False)
        for paragraph in part.split("\n\n")
    )


def origin() -> str:
    """The command that runs, on what, and when."""
    return f"`{command()}` on {machine()}"


def this() -> list[str]:
    """The benchmark that runs, a module, with its flags for Python's command line."""
    return ["-m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]


def command() -> str:
    """The command that runs, without the folders of this machine."""
    text = " ".join(["python3", *this()]).replace(f"{ROOT}/", "")
    return re.sub(r"(?<=[ =])/(?:[^ /]*/)*", "", text)


def table(rows: list[dict], left: int | None = None) -> str:
    """A Markdown table; the keys of the first row are the heading.

    Args:
        left: columns of words; the figures after them stand to the right.
    """
    words = len(rows[0]) if left is None else left
    rule = ["---"] * words + ["--:"] * (len(rows[0]) - words)
    lines = [list(rows[0]), rule, *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
