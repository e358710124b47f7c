"""HTML to Markdown, held against an independent renderer: what comes back renders to what came."""

import html
import json
import random
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from llama_lora.corpus.clean.escaping import STAND_INS, hide
from llama_lora.corpus.clean.html_to_markdown import converter, is_chatgpt_html, to_markdown
from llama_lora.corpus.records.conversation import Rejected
from tests.conftest import run_here, shipped

RENDERER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
BUTTON = '<button class="flex ml-auto gap-2"><svg><path d="M16 4"></path></svg>Copy code</button>'
# Around code, from December 2022 to 2024.
CHROMES = [
    f'<pre><div class="bg-black mb-4 rounded-md"><div class="flex">{BUTTON}</div>'
    '<div class="p-4"><code class="!whitespace-pre-wrap hljs{0}">{2}</code></div></div></pre>',
    f'<pre><div class="bg-black rounded-md mb-4"><div class="flex"><span>{{1}}</span>{BUTTON}</div>'
    '<div class="p-4"><code class="!whitespace-pre hljs{0}">{2}</code></div></div></pre>',
    '<pre class="overflow-visible!"><div class="rounded-md"><div class="flex">{1}</div><div '
    'class="sticky"><div><button aria-label="Copy">Copy</button><button>Edit</button></div></div>'
    '<div dir="ltr"><code class="whitespace-pre!{0}"><span>{2}</span></code></div></div></pre>',
]


def wrapped(inner, chrome=1):
    """HTML as ChatGPT shows it: in its wrapper, with chrome around code."""

    def code(match):
        language = re.search(r'class="language-([^"]*)"', match[1])
        name = language[1] if language else ""
        marked = f" language-{name}" if name else ""
        template = CHROMES[chrome].replace("{0}", marked).replace("{1}", name)
        return template.replace("{2}", match[2])

    inner = re.sub(r"<pre><code([^>]*)>(.*?)</code></pre>", code, inner, flags=re.DOTALL)
    return f'<div class="markdown prose w-full break-words dark:prose-invert dark">{inner}</div>'


def same(rendered):
    """Rendered HTML but for white space that shows nothing."""
    parts = re.split(r"(<pre>.*?</pre>)", rendered.replace("<br />", "<br>"), flags=re.DOTALL)
    parts[::2] = [re.sub(r"\s*\n\s*", "\n", part) for part in parts[::2]]
    return "".join(parts).strip()


# ------------------------------------------------------------------ documents


WORDS = r"""
alpha|beta|`code`|`` a`b ``|**bold**|*it*|***both***|**_x_**|*a **b** c*|snake_case|2*3|a<b|5|~~no~~
[link](http://x.y/a_b?c=d&e=(1))|![i](u.png "t")|<http://a.b>|tom & jerry|**a:** b|$5|#x|中文
\*star\*|*x*\*|&lt;tag&gt;|\<b>"""
WORDS = WORDS.strip().replace("\n", "|").split("|")
CODE = ["x = 1\n\n\ny = 2  ", "```\nin\n```", "a\n    b\n", "<p>\n\n</p>", "", "\n\nlead", "\\*_"]


class Document:
    """Random Markdown: `block` is one of anything that can be nested."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def text(self):
        return "\n\n".join(self.block(0) for _ in range(self.random.randint(1, 4)))

    def words(self, most=6):
        return " ".join(self.random.choice(WORDS) for _ in range(self.random.randint(1, most)))

    def block(self, depth):
        kinds = ["paragraph", "code", "heading"]
        if depth < 3:
            kinds += ["paragraph", "items", "items", "quote", "rule", "table"]
        return getattr(self, self.random.choice(kinds))(depth)

    def paragraph(self, depth):
        ends = ["", "\n" + self.words(), "\\\n" + self.words()]
        return self.words() + self.random.choice(ends)

    def code(self, depth):
        language = self.random.choice(["", "python", "c++"])
        return f"~~~~~{language}\n{self.random.choice(CODE)}\n~~~~~"

    def heading(self, depth):
        return "#" * self.random.randint(1, 6) + " " + self.words(3)

    def rule(self, depth):
        return "***"

    def quote(self, depth):
        inner = "\n\n".join(self.block(depth + 1) for _ in range(self.random.randint(1, 2)))
        return "\n".join("> " + line for line in inner.split("\n"))

    def items(self, depth):
        gap, first = self.random.choice(["\n", "\n\n"]), self.random.choice([0, 1, 3])
        items = []
        for number in range(self.random.randint(1, 3)):
            marker = f"{first + number}. " if first else "- "
            inner = self.words(3)
            if self.random.random() < 0.4:
                inner += gap + self.block(depth + 1)
            items.append(marker + ("\n" + " " * len(marker)).join(inner.split("\n")))
        return gap.join(items)

    def table(self, depth):
        head, one, two = (self.words(2) for _ in range(3))
        return f"| {head} | b |\n|:--|:-:|\n| {one} | `a\\|b` |\n| {two} | |"


@pytest.mark.parametrize("chrome", range(len(CHROMES)))
def test_documents_render_to_what_they_were_made_from(chrome):
    for seed in range(400):
        rendered = RENDERER.render(Document(seed).text())
        back = to_markdown(wrapped(rendered, chrome))
        assert same(RENDERER.render(back)) == same(rendered), f"seed {seed}\n{back}"


PIECES = [*"*_`~[]()<>&#+-=|!.\\ \n\nab12 ", "**", "__", "```", "~~", "&amp;", "<b>", "</b>"]
PIECES += ["http://x.y", "1. ", "- ", "](", "---", "===", "# ", "中", "foo", "|--|"]


@settings(max_examples=1500, deadline=None)
@example("```\n``")  # escaping the fence leaves two backticks, which would pair up
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_text_that_looks_like_markup_stays_text(text):
    text = "\n".join(line.strip() for line in text.split("\n") if line.strip())
    paragraph = f"<p>{html.escape(text, quote=False)}</p>" if text else ""
    back = RENDERER.render(to_markdown(wrapped(paragraph))).replace("&quot;", '"')
    assert re.sub(r"\s+", " ", back).strip() == re.sub(r"\s+", " ", paragraph)


@pytest.mark.parametrize(
    "text",
    [
        "snake_case and _init_py, 2 * 3 * 4, a < b, C:\\temp\\new, tom & jerry, #1, e.g. [1]",
        "It costs $5 - or 5% (about +3) - a*b | c. 1.5 > 1! x_1 and y_2; ~5 ~6; R&D; `",
        "**注意：**请先阅读",
    ],
)
def test_no_backslash_where_none_is_needed(text):
    assert to_markdown(wrapped(f"<p>{html.escape(text)}</p>")) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*a* and **b**", "\\*a* and \\*\\*b**"),
        ("call __init__ now", "call \\_\\_init__ now"),
        ("`a` or ``b``, not ``` here", "\\`a` or \\``b``, not ``` here"),
        ("[a](b), but a](b)", "[a\\](b), but a](b)"),
        ("![a](b), but ![a", "![a\\](b), but ![a"),
        ("<b>, <!-- x -->, <!-- and <A_B>", "\\<b>, \\<!-- x -->, <!-- and <A_B>"),
        ("[^1]: a note, no link", "[^1]: a note, no link"),
        ("[a]: b", "\\[a]: b"),
        ("<DIV and more", "\\<DIV and more"),
    ],
)
def test_one_backslash_where_one_is_enough(text, expected):
    assert to_markdown(wrapped(f"<p>{html.escape(text)}</p>")) == expected


def test_no_backslash_of_a_document_is_needless():
    for seed in range(150):
        back = to_markdown(wrapped(RENDERER.render(Document(seed).text())))
        rendered = RENDERER.render(back)
        for found in re.finditer(r"\\(?=[!-/:-@\[-`{-~])", back):
            without = back[: found.start()] + back[found.end() :]
            assert RENDERER.render(without) != rendered, f"seed {seed}, {found.start()}\n{back}"


PLAIN = re.compile(r"[\\`*_\[\]<>&~|!]|(?<=[0-9])[.)]|(?<![^\s=:|-])[#+=-]|#+$")


@settings(max_examples=1000, deadline=None)
@given(st.text("a1 \n#=.)|:`", max_size=8))
def test_what_could_be_markup_is_hidden(text):
    """What is found is what the rules say, one by one."""
    hidden = PLAIN.sub(lambda found: "".join(map(STAND_INS.get, found[0])), text)
    assert hide(text) == hidden


# ------------------------------------------------------------------ what ChatGPT shows


def formula(tex, display=False):
    inner = (
        '<span class="katex"><span class="katex-mathml"><math><semantics><mrow><mi>x</mi></mrow>'
        f'<annotation encoding="application/x-tex">{html.escape(tex)}</annotation></semantics>'
        '</math></span><span class="katex-html" aria-hidden="true">x</span></span>'
    )
    return f'<span class="katex-display">{inner}</span>' if display else inner


TWO_LINES = formula("x = 1 \\\\\n y", display=True)


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (f"<p>If {formula('a_1 < b^2')} then</p>", "If $a_1 < b^2$ then"),
        (
            f"<p>So:</p><p>{TWO_LINES}</p>",
            "So:\n\n$$\nx = 1 \\\\\n y\n$$",
        ),
        (
            f'<ul><li><p>a</p><div class="math math-display">{formula("z", True)}</div></li></ul>',
            "- a\n\n  $$\n  z\n  $$",
        ),
        ('<p><span class="katex-error">\\frac{</span></p>', "$\\frac{$"),
        ("<p>a<br>b<br></p>", "a  \nb"),
        ("<p>x<sup>2</sup> <u>y</u></p>", "x<sup>2</sup> y"),
        ('<p>a</p><div><button>1</button><span>2 / 3</span><button>2</button></div>', "a"),
        ('<p>a</p><div class="flex">Copy<button>Copy</button>12 chars / 3 words</div>', "a"),
        ("<p>3 / 4 of people agree</p>", "3 / 4 of people agree"),
        ("<p>Press Copy code</p>", "Press Copy code"),
        ('<ul><li><input type="checkbox" checked> done</li></ul>', "- [x] done"),
        ("<table><tbody><tr><td>a</td><td>b</td></tr></tbody></table>",
         "|  |  |\n| --- | --- |\n| a | b |"),
        ("<p>\ufdd0 is no character</p>", "\ufffd is no character"),
    ],
)  # fmt: skip
def test_what_chatgpt_shows(inner, expected):
    assert to_markdown(wrapped(inner)) == expected


def test_every_element_is_converted():
    """Also those whose names markdownify would take for one of its own methods."""
    names = {name.removeprefix("convert_") for name in dir(converter()) if name[:8] == "convert_"}
    for name in names:
        back = to_markdown(wrapped(f"<p>a</p><{name}>b<source src='u'></{name}><p>c</p>"))
        assert re.search(r"^a\s(.|\s)*\sc$", back), (name, back)
        assert "b" in back or name in ("script", "style", "input", "img"), (name, back)


def test_what_stands_outside_of_the_answer_is_chrome():
    answer = wrapped("<p>Yes.</p>")
    page = f'<div class="flex"><div><button>◀</button>2 / 2<button>▶</button></div>{answer}</div>'
    assert is_chatgpt_html(page)
    assert to_markdown(page) == "Yes."


def test_only_the_wrapper_makes_html():
    for text in [
        *("#include <iostream>", "<div>\n  <p>Why?</p>\n</div>", "`<div>`", "a <b> c", ""),
        '<div class="prose lg:prose-xl">\n <h1 id="x">Fix this</h1>\n <!-- todo --></div>',
        '<div class="markdown">\n <p>Why is it bold?</p>\n</div>',
        '<div class="markdown lg:prose"><p>Why is it wide?</p></div>',
        '<div class="prose"><div class="markdown">Which is it?</div></div>',
        '<div class="flex"><pre class="whitespace-pre-wrap">a &lt;b&gt;</pre>\n<p>why?</p></div>',
        '<div class="flex"><div class="whitespace-pre-wrap">a</div>\nwhy?</div>',
        '<div class="whitespace-pre-wrap">Why is <b>this</b> bold?</div>',
    ]:
        assert not is_chatgpt_html(text)
    bar = "<div><button>Edit</button></div>"
    assert is_chatgpt_html(f'<div class="flex"><div class="whitespace-pre-wrap">a</div>{bar}</div>')
    question = (
        '<div class="flex flex-col whitespace-pre-wrap">if a &lt; b:\n    pass  # my_var</div>'
    )
    assert is_chatgpt_html(question)
    assert to_markdown(question) == "if a < b:\n    pass  # my_var"


def test_cleaning_the_shipped_sample_keeps_its_code_and_cleaning_twice_changes_nothing(tmp_path):
    once, twice = tmp_path / "once.json", tmp_path / "twice.json"
    for source, target in [("data/sharegpt_sample.json", once), (once, twice)]:
        done = run_here("fastchat/data/clean_sharegpt.py", "--in", source, "--out", target)
        assert done.returncode == 0, done.stderr
    assert once.read_bytes() == twice.read_bytes()
    cleaned = json.loads(once.read_text(encoding="utf-8"))
    texts = "\0".join(turn["value"] for item in cleaned for turn in item["conversations"])
    assert '<div class="markdown' not in texts
    assert "Copy code" not in texts
    names = {item["id"] for item in cleaned}
    for item in shipped("sharegpt_sample.json"):
        for turn in item["conversations"] if item.get("id") in names else []:
            for code in CODE_BLOCK.findall(turn["value"] or ""):
                lines = html.unescape(re.sub(r"<[^>]+>", "", code)).rstrip("\n").split("\n")
                indented = r"\n *".join(map(re.escape, lines))  # code in a list is
                assert re.search(indented, texts), code


CODE_BLOCK = re.compile(r"<pre>.*?<code[^>]*>(.*?)</code>", re.DOTALL)


# ------------------------------------------------------------------ size


def test_a_text_of_many_megabytes_is_kept_whole_and_so_is_what_follows_it():
    code = "x" * 11_000_000
    back = to_markdown(wrapped(f"<p>a</p><pre><code>{code}</code></pre><p>end</p>"))
    assert back == f"a\n\n```\n{code}\n```\n\nend"


@pytest.mark.parametrize(
    "inner",
    [
        "<pre><code>x</code></pre><p>a_b *c</p>" * 16_000,
        "<ol>" + "<li>one *two</li>" * 30_000 + "</ol>",
        "<p>" + "word *word _word &lt;a `b [c](d " * 60_000 + "</p>",
        "<p>" + "<em>a</em>" * 30_000 + "</p>",
        "<table>" + "<tr><td>a</td><td>b|c</td></tr>" * 20_000 + "</table>",
        "<ul><li>one</li></ul>" * 20_000,
        "<ul><li>" * 60 + "a<p>b</p>" * 500 + "</li></ul>" * 60,
        "<button>x</button>" * 20_000,
        "<div>" * 100 + "<button>x</button>" * 20_000 + "</div>" * 100,
        "<p>" + "![ &lt;? &lt;!-- [a](( `` ` " * 30_000 + "</p>",
    ],
    ids=[
        *("fences", "items", "text", "emphasis", "table", "lists", "nested", "buttons", "bars"),
        "openings",
    ],
)
def test_time_grows_with_the_text_alone(inner):
    began = time.process_time()
    to_markdown(wrapped(inner))
    assert time.process_time() - began < 30


def test_what_is_nested_too_deeply_is_rejected():
    for deep in ("<ul><li>" * 10_000, "<div>" * 200 + "</div>" * 200, "<b>" * 100_000):
        with pytest.raises(Rejected, match="nested too deeply"):
            to_markdown(wrapped(deep))
