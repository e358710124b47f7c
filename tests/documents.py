"""The documents as a reader takes them: commands to paste, what these print, links to follow."""

import argparse
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

from tests.conftest import ROOT

README, CHINESE = ROOT / "README.md", ROOT / "README_cn.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", re.M | re.S)
OPERATORS = "();<>|&\n"


@dataclass(frozen=True)
class Block:
    """Commands that stand together, and what the last one prints where that stands below them."""

    text: str
    output: str | None


def text_of(page) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    found = BLOCK.findall(text_of(page))
    return [Block(without_comments(text), output or None) for text, output in found]


def without_comments(text: str) -> str:
    return re.sub(r"(?m)(^|\s+)#.*$", "", text)


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell text, without what its output goes into."""
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars=OPERATORS)
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
    parts = groupby(lexer, key=lambda word: set(word) <= set(OPERATORS))
    return [list(words) for is_operator, words in parts if not is_operator]


def prose(page: Path) -> str:
    """The text between the blocks of code."""
    return re.sub(r"^```.*?^```\n", "", text_of(page), flags=re.M | re.S)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def script_and_flags(words: list[str]) -> tuple[str, list[str]] | None:
    """The script or module of this project that a command runs, and what it gives it."""
    for i, word in enumerate(words):
        if word.endswith(".py") and not word.startswith("tests/"):
            return word, words[i + 1 :]
        if word.startswith("benchmarks.") and words[i - 1] == "-m":
            return f"{word.replace('.', '/')}.py", words[i + 1 :]
    return None


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script makes, caught as it is about to parse."""

    class Caught(Exception):
        pass

    def catch(parser, *_, **__):
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script])
        patch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
        patch.syspath_prepend(str((ROOT / script).parent))
        with pytest.raises(Caught) as caught:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return caught.value.args[0]
