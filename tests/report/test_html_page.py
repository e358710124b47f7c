"""The page of a corpus report, as a real browser shows it: text stays text, all of it is found."""

import html
import json
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from llama_lora.report import charts
from llama_lora.report.conversation_view import FRAME, TRAINED
from tests.browser import needs_chromium, opened
from tests.corpora import conversation, save
from tests.report.inspected import HOSTILE, inspect


def test_a_page_that_cannot_be_made_leaves_the_old_one(piece):
    piece.with_name("pieces.json.account").write_text("{")
    page = piece.with_name("page.html")
    page.write_text("old")
    done = inspect("--in", piece, "--html", page)
    assert done.returncode == 1
    assert not done.stdout  # told before the statistics, which can take long
    assert page.read_text() == "old"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1) | st.lists(st.integers(0, 10**6), min_size=1),
)
def test_histograms_count_every_value_once(values):
    bins = charts.histogram(values)
    for value in set(values):
        assert sum(one.low <= value <= one.high for one in bins) == 1
    for one in bins:
        assert one.count == sum(one.low <= value <= one.high for value in values)
    assert all(this.high + 1 == that.low for this, that in pairwise(bins))
    assert len(bins) <= 2 * charts.MOST_BINS


class Elements(HTMLParser):
    """What a parser that knows no policy sees: the tags and their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = Counter()
        self.attributes = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += attributes


def conversations_on(page):
    """What the page holds for its script."""
    return json.loads(page.partition('id="conversations">')[2].partition("</script>")[0])


def test_text_of_the_corpus_stays_text(chain):
    page = (chain / "report.html").read_text(encoding="utf-8")
    seen = Elements(page)
    assert seen.tags["script"] == 3
    assert not seen.tags["img"]
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name == "style"]
    sources = [value for name, value in seen.attributes if name in ("src", "href")]
    assert sources == ["data:,"]
    (shown,) = [one for one in conversations_on(page) if one["id"] == HOSTILE]
    assert "{{ 7*7 }}" in "".join(shown["blocks"][0][1][1::2])
    told = html.unescape(page[page.index("blocked phrase") : page.index('id="conversations"')])
    assert HOSTILE in told


def test_the_sample_is_capped_and_said(tmp_path):
    items = [conversation(f"c{n}", f"Question {n}?", "Yes.") for n in range(30)]
    path, page = save(tmp_path / "c.json", [*items, 42]), tmp_path / "page.html"
    for count in (7, 0):
        inspect("--in", path, "--html", page, "--sample", count)
        text = page.read_text(encoding="utf-8")
        assert len({one["id"] for one in conversations_on(text)}) == count
        assert f"{count} of 30, chosen at random" in text


LIST = "document.querySelectorAll('#list button')"
SETTLE = "new Promise(done => setTimeout(done, 300))"


@needs_chromium
def test_in_a_browser(chain, tmp_path):
    items = json.loads((chain / "split_long_conversation.json").read_text())
    with opened(chain / "report.html", tmp_path) as page:
        assert page.run(f"{LIST}.length") == 200
        page.run("document.querySelector('#more').click()")
        assert page.run(f"{LIST}.length") == len(items)

        page.run(f"document.querySelector('#search').value = {json.dumps('onerror=')}")
        page.run(f"document.querySelector('#search').dispatchEvent(new Event('input')), {SETTLE}")
        assert page.run(f"{LIST}.length") == 1
        assert page.run("document.querySelector('#matches').value") == f"1 of {len(items)}"
        page.run(f"{LIST}[0].click()")
        assert page.run("document.querySelector('article h3').textContent") == HOSTILE
        trained = "[...document.querySelectorAll('article .trained')].map(x => x.textContent)"
        assert page.run(trained) == [f" This is {HOSTILE} as text.</s>"]
        wash, plain = (
            page.run(f"getComputedStyle(document.querySelector('article .{kind}')).backgroundColor")
            for kind in (TRAINED, FRAME)
        )
        assert wash != plain
        assert page.run("CSS.highlights.get('found').size") == 3  # in the id is no text node more

        page.run("document.querySelector('#search').value = 'continues in another piece'")
        page.run(f"document.querySelector('#search').dispatchEvent(new Event('input')), {SETTLE}")
        assert page.run(f"{LIST}.length") == sum(bool(one.get("unfinished")) for one in items)

        flow_rows = "[...document.querySelectorAll('.flow tbody th')].map(x => x.textContent)"
        assert page.run(flow_rows)[:2] == ["merge", "clean_sharegpt"]
        for width in (360, 1280):
            page.screenshot(tmp_path / "shot.png", width, 800)
            assert page.run("document.documentElement.scrollWidth") == width
        assert page.run("window.hacked") is None
        assert page.requests == [(chain / "report.html").as_uri()]
        assert not page.complaints

        # Were a text to become markup all the same, the policy would still stop it.
        page.run(
            "document.body.insertAdjacentHTML('beforeend', "
            '\'<img src="http://127.0.0.1:9/x.png" onerror="window.hacked = 1">\')'
        )
        page.run(SETTLE)
        assert page.run("window.hacked") is None
        assert any("Content Security Policy" in text for text in page.complaints)
