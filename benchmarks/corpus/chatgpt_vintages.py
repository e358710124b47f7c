"""Markdown as the HTML that ChatGPT's page showed it in, in four vintages of its chrome."""

import html
import itertools
import re

from latex2mathml.converter import convert as mathml
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline

SVG = (
    '<svg stroke="currentColor" fill="none" viewBox="0 0 24 24" class="h-4 w-4">'
    '<path d="M16 4h2a2 2 0 0 1 2 2v14"></path><rect x="8" y="2" width="8" height="4"></rect></svg>'
)
# The wrapper of an answer; around code, with its language twice, its class, and the code.
VINTAGES = {
    "early 2023": (
        '<div class="markdown prose w-full break-words dark:prose-invert dark">{}</div>',
        '<pre><div class="bg-black mb-4 rounded-md"><div class="flex items-center text-gray-200 '
        'bg-gray-800 px-4 py-2 text-xs font-sans"><button class="flex ml-auto gap-2">{svg}Copy '
        'code</button></div><div class="p-4 overflow-y-auto"><code class="!whitespace-pre-wrap '
        'hljs{mark}">{code}</code></div></div></pre>',
    ),
    "late 2023": (
        '<div class="markdown prose w-full break-words dark:prose-invert dark">{}</div>',
        '<pre><div class="bg-black rounded-md mb-4"><div class="flex items-center relative '
        'text-gray-200 bg-gray-800 px-4 py-2 text-xs font-sans justify-between rounded-t-md">'
        '<span>{language}</span><button class="flex ml-auto gap-2">{svg}Copy code</button></div>'
        '<div class="p-4 overflow-y-auto"><code class="!whitespace-pre hljs{mark}">{code}</code>'
        "</div></div></pre>",
    ),
    "2024": (
        '<div class="markdown prose w-full break-words dark:prose-invert light">{}</div>',
        '<pre class="!overflow-visible"><div class="dark bg-gray-950 contain-inline-size '
        'rounded-md border-[0.5px] border-token-border-medium relative"><div class="flex '
        'items-center text-token-text-secondary px-4 py-2 text-xs font-sans">{language}</div><div '
        'class="sticky top-9 md:top-[5.75rem]"><div class="absolute bottom-0 right-2 flex h-9">'
        '<span class="" data-state="closed"><button class="flex gap-1 items-center" '
        'aria-label="Copy">{svg}Copy code</button></span></div></div><div class="overflow-y-auto '
        'p-4" dir="ltr"><code class="!whitespace-pre hljs{mark}">{code}</code></div></div></pre>',
    ),
    "2025": (
        '<div class="markdown prose dark:prose-invert w-full break-words light">{}</div>',
        '<pre class="overflow-visible!"><div class="contain-inline-size rounded-2xl relative '
        'bg-token-sidebar-surface-primary"><div class="flex items-center text-xs font-sans h-9">'
        '{language}</div><div class="sticky top-9"><div class="absolute end-0 bottom-0 flex h-9">'
        '<div class="flex items-center gap-4"><button class="flex gap-1" aria-label="Copy">{svg}'
        'Copy</button><button class="flex gap-1">{svg}Edit</button></div></div></div><div '
        'class="overflow-y-auto p-4" dir="ltr"><code class="whitespace-pre!{mark}"><span>{code}'
        "</span></code></div></div></pre>",
    ),
}
TABLE = (
    '<div class="_tableContainer_16hzy_1"><div tabindex="-1" class="_tableWrapper_16hzy_14 group '
    'flex w-fit flex-col-reverse">{table}<div class="sticky h-0 self-end select-none"><div '
    'class="absolute end-0 flex items-end"><span data-state="closed"><button '
    'aria-label="Copy Table">{svg}</button></span></div></div></div></div>'
)
FENCE = re.compile(r'<pre><code(?: class="language-([^"]*)")?>(.*?)</code></pre>', re.DOTALL)
OPENING = re.compile(r"<(p|h[1-6]|ul|ol|li|blockquote|table|thead|tbody|tr|th|td|strong|em)\b")
WHOLE_TABLE = re.compile(r"<table.*?</table>", re.DOTALL)
HIGHLIGHTED = re.compile(
    r"(?P<comment>(?<!\S)(?:#|//) [^\n]*)|(?P<string>&quot;[^\n]*?&quot;|'[^'\n]*')"
    r"|\b(?P<number>\d+(?:\.\d+)?)\b|\b(?P<keyword>import|from|def|class|return|if|else|elif|for|in"
    r"|while|function|const|let|var|new|try|except|catch|public|static|void|int|SELECT|FROM|WHERE)\b"
    r"|\b(?P<built_in>print|len|range|console|document|self|this|str|map)\b"
)
TEX = re.compile(r"\$\$\s*([^$]+?)\s*\$\$|\$(?!\s)((?:[^$\n\\`]|\\.)+?)(?<!\s)\$(?!\d)", re.DOTALL)


def renderer(raw_html: bool = True) -> MarkdownIt:
    """CommonMark with GitHub's tables and strikethrough, and formulas between dollars."""
    parser = MarkdownIt("commonmark", {"html": raw_html}).enable(["table", "strikethrough"])
    parser.inline.ruler.before("escape", "formula", formula)
    parser.add_render_rule(
        "formula", lambda self, tokens, at, *_: katex(tokens[at].content, tokens[at].block)
    )
    return parser


def formula(state: StateInline, silent: bool) -> bool:
    """markdown-it's rule for `$…$` and `$$…$$`, with pandoc's conditions on the spaces."""
    found = TEX.match(state.src, state.pos) if state.src[state.pos] == "$" else None
    if found is None or found.end() > state.posMax:
        return False
    if not silent:
        token = state.push("formula", "span", 0)
        token.content, token.block = found[1] or found[2], found[1] is not None
    state.pos = found.end()
    return True


def katex(tex: str, display: bool) -> str:
    """A formula as KaTeX writes it: MathML with the source, and what is seen."""
    tex = tex.strip()
    seen = "".join(f'<span class="mord mathnormal">{html.escape(char)}</span>' for char in tex)
    inner = (
        '<span class="katex"><span class="katex-mathml"><math xmlns="http://www.w3.org/1998/Math/'
        f'MathML"><semantics>{mathml_parts(tex)}<annotation encoding="application/x-tex">'
        f"{html.escape(tex)}</annotation></semantics></math></span>"
        '<span class="katex-html" aria-hidden="true"><span class="base">'
        f'<span class="strut" style="height: 1em;"></span>{seen}</span></span></span>'
    )
    return f'<span class="katex-display">{inner}</span>' if display else inner


def mathml_parts(tex: str) -> str:
    """What is in the `math` element of a formula."""
    try:
        return re.fullmatch(r"<math[^>]*>(.*)</math>", mathml(tex), re.DOTALL)[1]
    except Exception:  # latex2mathml's errors share no class; here they are all "not a formula"
        return f"<mtext>{html.escape(tex)}</mtext>"


def chatgpt_html(rendered: str, vintage: str) -> str:
    """Rendered Markdown as ChatGPT's page holds it."""
    wrapper, chrome = VINTAGES[vintage]
    parts = FENCE.split(rendered)  # HTML, language, code, HTML …
    if vintage == "2025":
        count = itertools.count(0, 17)
        parts[::3] = [with_chrome_of_2025(part, count) for part in parts[::3]]
    pieces = parts[:1]
    for language, code, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        mark = f" language-{language}" if language else ""
        language = language or ""
        pieces.append(chrome.format(svg=SVG, language=language, mark=mark, code=highlighted(code)))
        pieces.append(after)
    return wrapper.format("".join(pieces))


def with_chrome_of_2025(part: str, count: itertools.count) -> str:
    """Offsets in every element, and a bar on every table."""
    part = OPENING.sub(
        lambda found: f'{found[0]} data-start="{next(count)}" data-end="{next(count)}"', part
    )
    return WHOLE_TABLE.sub(lambda found: TABLE.format(table=found[0], svg=SVG), part)


def highlighted(code: str) -> str:
    """Escaped code with the spans of highlight.js, roughly as many as it makes."""
    return HIGHLIGHTED.sub(
        lambda found: f'<span class="hljs-{found.lastgroup}">{found[0]}</span>', code
    )
