"""The documents hold: commands that parse, links that lead somewhere, a README in two languages."""

import re

import pytest

from llama_lora.train import foreign_flags
from tests.conftest import ROOT
from tests.documents import (
    CHINESE,
    PAGES,
    README,
    blocks,
    commands,
    inline_code,
    parser_of,
    prose,
    script_and_flags,
    text_of,
)

DOCS = ROOT / "docs"
COMMANDS = {
    page: [words for block in blocks(page) for words in commands(block.text)]
    + [
        code.split()
        for code in inline_code(page)
        if code.startswith("python3 ") and "…" not in code
    ]
    for page in PAGES
}
RUN = [
    (page, *run) for page in PAGES for words in COMMANDS[page] if (run := script_and_flags(words))
]
# Flags of other tools that the text names by themselves.
OTHERS = {
    *("--num_gpus", "--master_port"),  # deepspeed
    *("--enable-lora", "--max-lora-rank"),  # vLLM
    "--apply_chat_template",  # lm_eval
}
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def links(page) -> list[str]:
    """What a page links to in this project: pages, pictures and headings."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if "://" not in target]


def anchors(page) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- Commands ----


@pytest.mark.parametrize("script", sorted({script for _, script, _ in RUN}))
def test_a_script_accepts_every_command_that_names_it(script, capsys):
    for page, name, flags in RUN:
        if name == script:
            try:
                parser_of(script).parse_args(flags)
            except SystemExit:
                pytest.fail(f"{page}: {script} {' '.join(flags)}: {capsys.readouterr().err}")


def test_every_flag_in_the_text_is_one_of_a_script():
    scripts = {script for _, script, _ in RUN} | {"benchmarks/gpu_16gb.py"}
    known = OTHERS | {f"--{name}" for name in foreign_flags.ANSWERED}
    for script in scripts:
        known.update(*(action.option_strings for action in parser_of(script)._actions))
    named = {
        (str(page.relative_to(ROOT)), flag)
        for page in PAGES
        for code in inline_code(page)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
    }
    assert len(named) > 50
    assert not {(page, flag) for page, flag in named if flag not in known}


@names
def test_what_its_commands_name_is_there(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in COMMANDS[page] + [code.split() for code in inline_code(page)]:
        match words:
            case ["make", target, *_]:
                assert target in targets
            case ["python3", *_] if run := script_and_flags(words):
                assert (ROOT / run[0]).is_file()
            case ["pip", "install", "-r", requirements]:
                assert (ROOT / requirements).is_file()


def test_every_page_that_a_benchmark_writes_is_written_again_by_make_bench():
    bench = re.findall(r"python3 -m (benchmarks\.[\w.]+) --write", (ROOT / "Makefile").read_text())
    pages = [text_of(page) for page in DOCS.glob("*.md")]
    named = {one for text in pages for one in re.findall(r"-m (benchmarks\.[\w.]+) --write", text)}
    assert len(bench) > 10
    assert sorted(bench) == sorted(named)


# ---- Links ----


@names
def test_every_link_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_names_every_page_once():
    index = DOCS / "README.md"
    listed = re.findall(r"^- \[[^]]+\]\(([^.)][^)]+)\)", text_of(index), re.M)
    pages = [page for page in PAGES if DOCS in page.parents and page != index]
    assert sorted(DOCS / link for link in listed) == pages


# ---- The README ----


def test_the_readme_is_read_in_five_minutes():
    assert len(text_of(README).splitlines()) <= 300


def test_both_readmes_hold_the_same():
    """The same commands and outputs in the same order, and the same links."""
    assert blocks(CHINESE) == blocks(README)
    ours, theirs = ({link for link in links(page) if "." in link} for page in (README, CHINESE))
    assert ours - {"README_cn.md"} == theirs - {"README.md"}


def test_the_tree_names_what_is_there():
    trees = [
        [(line[:27].split(), line.startswith(" ")) for line in tree.splitlines()]
        for page in (README, CHINESE)
        for tree in re.findall(r"^```\n(fastchat/.*?)^```", text_of(page), re.M | re.S)
    ]
    assert trees[0] == trees[1]
    for names, inside in trees[0]:
        folder = ROOT / "llama_lora" if inside else ROOT
        assert all(list(folder.glob(name)) for name in names), names
