"""The page of an evaluation, as a real browser shows it: what it says is true, and stays text."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_lora.eval import bootstrap
from llama_lora.eval.html_page import kind_of, texts, verdict
from llama_lora.model.template import Template, load_tokenizer
from tests.browser import needs_chromium, opened
from tests.corpora import conversation, said, save, save_lines
from tests.eval.evaluation import adapted, evaluate

HOSTILE = "</p><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.mark.parametrize("tokenizer", ["llama_tokenizer", "byte_tokenizer"])
@pytest.mark.parametrize(
    "text", ["Ça va: 我说中文 🐦, и по-русски!\n  x", "I am", "\ufffd a \ufffd"]
)
def test_the_texts_of_tokens_are_the_whole(tokenizer, text, request):
    tokenizer = request.getfixturevalue(tokenizer)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    found = list(texts(ids, tokenizer))
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


def test_the_stronger_a_change_the_higher_its_level():
    changes = [-5, -3, -1.5, -0.3, -0.1, 0, float("nan"), 0.19, 0.2, 2, 9]
    better, worse = ([f"{side}-{level}" for level in (1, 2, 3)] for side in ("better", "worse"))
    expected = [better[2], better[2], better[1], better[0], *["same"] * 4, *worse]
    assert list(map(kind_of, changes)) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((-2.0, -3.0, -1.0), "The adapter is better"),
        ((2.0, 1.0, 3.0), "The adapter is worse"),
        ((-1.0, -3.0, 1.0), "the difference may be chance"),
        ((-1.0, None, None), "too few to tell"),
    ],
)
def test_the_verdict_follows_the_interval(change, said):
    assert said in verdict(bootstrap.Estimate(*change))


@pytest.fixture(scope="module")
def hostile_base(tmp_path_factory, tiny_base) -> Path:
    """A model whose every answer is `HOSTILE`: a chain of two tokens, each known by its embedding.

    Its layers add nothing, so what comes next depends on the token before alone.
    """
    folder = tmp_path_factory.mktemp("hostile-base")
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.add_tokens([HOSTILE])
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.resize_token_embeddings(len(tokenizer))
    said_last = Template(tokenizer).prompt_ids(said("Who?"))[-1]
    hostile = tokenizer.convert_tokens_to_ids(HOSTILE)
    torch.manual_seed(0)  # losses of about 30: a perplexity wider than a phone
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        torch.nn.init.normal_(embeddings)
        head.zero_()
        for before, after in ((said_last, hostile), (hostile, tokenizer.eos_token_id)):
            head[after] = embeddings[before] * 10
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hostile_page(tmp_path, hostile_base) -> Path:
    """What a model, a corpus and a question file can do to a page; and words without a break."""
    items = [
        conversation(f"{HOSTILE}{n}", HOSTILE, f"x {HOSTILE} {n}", "y", "z" * 300)
        for n in range(24)
    ]
    asked = [
        {
            "question_id": HOSTILE,
            "category": HOSTILE,
            "language": f'en" {HOSTILE}',
            "text": HOSTILE,
        },
        {"question_id": 2, "category": "{{ 7 * 7 }}", "turns": ["\x1b[2J\u202e" + "w" * 500, "?"]},
    ]
    adapter_folder = adapted(hostile_base, tmp_path / f"out{HOSTILE.replace('/', '')}")
    done = evaluate(
        *("--base_model", hostile_base, "--lora_weights", adapter_folder),
        *("--data_path", save(tmp_path / "corpus.json", items)),
        *("--questions", save_lines(tmp_path / "q.jsonl", asked), "--max_new_tokens", 8),
        *("--output_dir", tmp_path / "page"),
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / "page" / "evaluation.html"


class Elements(HTMLParser):
    """What a parser that knows no policy sees: the tags and their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes


def test_text_of_the_models_stays_text(hostile_page):
    page = hostile_page.read_text(encoding="utf-8")
    seen = Elements(page)
    assert seen.tags.isdisjoint({"script", "img", "iframe", "object", "form"})
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name == "style"]
    sources = [value for name, value in seen.attributes if name in ("src", "href")]
    assert all(value == "data:," or value.startswith("#category-") for value in sources)
    assert "{{ 7 * 7 }}" in page
    assert "\x1b" not in page
    assert "\u202e" not in page


@needs_chromium
def test_in_a_browser(hostile_page, tmp_path):
    with opened(hostile_page, tmp_path / "profile") as page:
        answer = "document.querySelector('.answer.base .text').textContent"
        assert page.run(answer) == HOSTILE
        assert page.run("document.querySelector('.question').textContent") == HOSTILE
        tops = "[...document.querySelectorAll('.asked .pair')[0].children]"
        tops += ".map(x => Math.round(x.getBoundingClientRect().top))"
        colours = set()
        for width, height, dark in ((1280, 900, False), (1280, 900, True), (400, 800, False)):
            page.screenshot(tmp_path / "shot.png", width, height, dark)
            assert page.run("document.documentElement.scrollWidth") == width
            first, second = page.run(tops)
            assert (first == second) is (width > 400)  # beside each other where there is room
            colours.add(page.run("getComputedStyle(document.body).backgroundColor"))
        assert len(colours) == 2
        assert page.run("document.querySelectorAll('svg').length") == 2
        bar = "document.querySelector('svg .better rect, svg .worse rect')"
        assert page.run(f"getComputedStyle({bar}).fill") != "rgb(0, 0, 0)"
        assert page.run("window.hacked") is None
        assert page.requests == [hostile_page.as_uri()]
        assert not page.complaints
