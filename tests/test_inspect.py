"""Looking at a corpus: the figures are right, and so is the page, as a real browser shows it."""

import html
import json
import os
import pty
import random
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from browser import needs_chromium, opened
from conftest import OFFLINE, ROOT, run_script, shipped
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_lora.cli import InputError
from llama_lora.corpus import stage
from llama_lora.model.template import IGNORE, Template
from llama_lora.report import charts, flow, terminal
from llama_lora.report.view import BEYOND, FRAME, PLAIN, TRAINED, view
from llama_lora.train.examples import load_examples

INSPECT = "fastchat/data/inspect_data.py"
CLEAN = "fastchat/data/clean_sharegpt.py"
WINDOW = 256
HOSTILE = '</script><img src=x onerror="window.hacked=1"><!--<script>{{ 7*7 }}\'&amp;\u2028'


def conversation(name, *texts, **rest):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": name, "conversations": turns, **rest}


def save(path, items):
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory, llama_tokenizer):
    """A folder with a tokenizer, which is all of a base model that is looked at."""
    folder = tmp_path_factory.mktemp("base")
    llama_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory, base):
    """The folder in which the stages ran on shipped data, hostile data among it, and `report.html`.

    They ran inside of it, which is not where we are.
    """
    folder = tmp_path_factory.mktemp("chain")
    items = [*shipped("dummy_en.json")[:60], *shipped("sharegpt_sample.json")[:60]]
    items += [conversation(HOSTILE, f"Show {HOSTILE}, please.", f"This is {HOSTILE} as text.")]
    items += [conversation("blocked", "Who are you?", f"I am ChatGPT, {HOSTILE}")]
    items += [{"id": "none", "conversations": HOSTILE}]
    long = " ".join(f"This is sentence {n} of a long answer." for n in range(120))
    items += [conversation("long", "Say a lot, please.", long)]
    save(folder / "raw.json", items)
    stages = {
        "merge": ["--rejected", "merge.rejected.jsonl"],
        "clean_sharegpt": ["--rejected", "clean.rejected.jsonl"],
        "optional_clean": ["--keep-lang", "en", "--rejected", "language.rejected.json"],
        "split_long_conversation": ["--model-name", base, "--max-length", WINDOW],
    }
    source = "raw.json"
    for name, flags in stages.items():
        command = [sys.executable, ROOT / "fastchat" / "data" / f"{name}.py", "--in", source]
        subprocess.run(
            [*command, "--out", f"{name}.json", "--workers", "1", *map(str, flags)],
            cwd=folder,
            env={**os.environ, **OFFLINE},
            check=True,
            capture_output=True,
        )
        source = f"{name}.json"
    done = run_script(
        INSPECT,
        *("--in", folder / source, "--model-name", base, "--max-length", WINDOW),
        *("--html", folder / "report.html"),
    )
    assert done.returncode == 0, done.stderr
    (folder / "report.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def rows(text):
    """The lines of the report by their names, from the second column on."""
    return {line[:18].strip(): line[18:].strip() for line in text.splitlines() if line.strip()}


def nearest_rank(values, share):
    """The smallest of the values that `share` percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(-(-share * len(ordered) // 100), 1) - 1]


def first_fit(lengths, room):
    """Rows by the definition of best fit decreasing, with no cleverness."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [n for n, left in enumerate(free) if left >= length]
        if fitting:
            free[min(fitting, key=free.__getitem__)] -= length
        else:
            free.append(room - length)
    return len(free)


def test_figures_of_a_split_file(chain, base, llama_tokenizer):
    items = json.loads((chain / "split_long_conversation.json").read_text())
    template = Template(llama_tokenizer)
    _, audit = load_examples(str(chain / "split_long_conversation.json"), template, WINDOW)
    turns = [turn for item in items for turn in item["conversations"]]
    encoded = template.encode_batch(items)
    tokens = [len(one.ids) for one in encoded]
    labelled = [sum(label != IGNORE for label in one.labels) for one in encoded]
    measured = {
        "turns": [len(item["conversations"]) for item in items],
        "characters, question": [len(t["value"]) for t in turns if t["from"] == "human"],
        "characters, answer": [len(t["value"]) for t in turns if t["from"] == "gpt"],
        "tokens": tokens,
        "labelled tokens": labelled,
    }
    text = (chain / "report.txt").read_text()
    found = rows(text)
    roles = Counter(turn["from"] for turn in turns)
    assert found["roles"] == ", ".join(f"{role} {n}" for role, n in sorted(roles.items()))
    assert found["conversations"] == f"{len(items)} with {roles['human']} pairs"
    assert found["formats"] == f"ShareGPT {len(items)}"
    assert found["duplicates"] == "none"
    for name, values in measured.items():
        line = next(line for line in text.splitlines() if line.startswith(name + " "))
        figures = [int(cell.replace(",", "")) for cell in line.removeprefix(name).split()]
        shares = [nearest_rank(values, share) for share in (0, 5, 25, 50, 75, 95, 99, 100)]
        assert figures == [*shares, round(sum(values) / len(values))], name
    packs = first_fit(tokens, WINDOW)
    assert f"at {WINDOW} tokens: {audit}\n" in text
    assert f"an epoch: {packs} packs, {sum(tokens) / packs / WINDOW:.1%} full" in text


def test_what_is_beyond_the_window_is_counted_as_the_trainer_counts_it(
    chain, base, llama_tokenizer
):
    path = chain / "optional_clean.json"
    done = run_script(INSPECT, "--in", path, "--model-name", base, "--max-length", 128)
    _, audit = load_examples(str(path), Template(llama_tokenizer), 128, allow_truncation=True)
    assert audit.truncated
    assert audit.unlabelled
    assert f"at 128 tokens: {audit}\n" in done.stdout


def test_what_is_wrong_with_a_raw_file(tmp_path):
    items = [
        conversation("a", "Where does the sun go?", "Below the horizon."),
        conversation("b", "Where does the sun  go?", "Below the horizon."),
        conversation("c", "Where does the sun go?", "Below the horizon.", "Why?", "It turns."),
        conversation("c", "Was ist das?", "Das ist ein deutscher Satz über das Wetter von heute."),
        {"id": 7, "messages": [{"role": "user", "content": "x"}]},
        {"instruction": "Say it.", "output": "It."},
        {"id": "wrong", "conversations": None},
        conversation("odd", "x", "y", "z", "w", label_from=9),
        42,
    ]
    done = run_script(INSPECT, "--in", save(tmp_path / "raw.json", items))
    found = rows(done.stdout)
    assert found["conversations"] == "7 with 8 pairs"
    assert found["formats"] == "ShareGPT 5, Alpaca 1, OpenAI messages 1"
    assert found["roles"] == "human 9, gpt 8"
    assert "de 1" in found["languages"]
    assert found["duplicates"] == "beginning of a longer one 2, equal ids 1"
    assert found["unreadable"] == "no list of turns 1, not an object 1"
    assert found["not trainable"] == (
        "label_from is no place in the answer 1, no question with an answer 1"
    )
    assert found["repaired as read"] == "integer ids 1, missing ids 1, role names 1"


def test_several_processes_find_what_one_does(tmp_path):
    texts = [turn["value"] for one in shipped("dummy_en.json") for turn in one["conversations"]]
    choose = random.Random(0)
    items = [
        conversation(f"{n}", choose.choice(texts), " ".join(choose.choices(texts, k=40)))
        for n in range(2600)
    ]
    path = save(tmp_path / "big.json", items)
    assert path.stat().st_size > 4 << 20
    page = tmp_path / "page.html"
    found = []
    for workers in ("1", "2"):
        flags = "--workers", workers, "--html", page, "--sample", len(items)
        found.append((run_script(INSPECT, "--in", path, *flags).stdout, page.read_text()))
    assert found[0] == found[1]
    assert rows(found[0][0])["conversations"] == "2,600 with 2,600 pairs"


def test_damage_at_the_end_of_a_large_file_is_told(tmp_path):
    """It has many chunks, so the damage is found long after the first was added up."""
    items = [conversation(f"{n}", f"Question {n}?", "Yes. " * 300) for n in range(1200)]
    path, page = tmp_path / "cut.json", tmp_path / "page.html"
    path.write_text(json.dumps(items)[:-900])
    assert path.stat().st_size > 4 * stage.CHUNK_BYTES
    flags = "--salvage", "--html", page, "--sample", 1
    done = run_script(INSPECT, "--in", path, *flags)
    assert rows(done.stdout)["conversations"] == "1,199 with 1,199 pairs"
    assert "conversation 1199 (byte " in done.stderr
    assert "conversation 1199 (byte " in page.read_text(encoding="utf-8")


TEXT = st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
    system=st.none() | TEXT,
    marks=st.sampled_from([{}, {"label_from": 1}, {"unfinished": True}]),
    window=st.sampled_from([12, 40, 1000]),
    kind=st.sampled_from(["model", "vicuna_v1.1", "stripping", "changing"]),
)
def test_what_is_coloured_is_what_is_learned(byte_tokenizer, texts, system, marks, window, kind):
    template = TEMPLATES[kind](byte_tokenizer)
    item = conversation("c", *[text for pair in texts for text in pair], **marks)
    if system is not None:
        item["conversations"].insert(0, {"from": "system", "value": system})
    shown = view(item, 0, template, window)
    every = [segment for block in shown.blocks for segment in block.segments]
    encoded = template.encode(item["conversations"], **marks)
    assert "".join(one.text for one in every) == template.text(item["conversations"])

    def decoded(ids):
        return template.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    within = zip(encoded.ids[:window], encoded.labels, strict=False)
    learned = decoded([id for id, label in within if label != IGNORE])
    assert "".join(one.text for one in every if one.kind == TRAINED) == learned
    beyond = decoded(encoded.ids[window:])
    assert "".join(one.text for one in every if one.kind == BEYOND) == beyond
    if kind != "changing":
        assert [block.role for block in shown.blocks] == [
            turn["from"] for turn in item["conversations"]
        ]
        own = "".join(one.text for one in every if one.kind == PLAIN)
        asked = "".join(t["value"] for t in item["conversations"] if t["from"] != "gpt")
        context = item["conversations"][-1]["value"][: marks.get("label_from", 0)]
        if window == 1000 and kind != "stripping":
            # A token that reaches over `label_from` is learned whole or not at all.
            assert own.startswith(asked)
            assert len(own) <= len(asked + context) + 10
    assert (shown.tokens, shown.labelled) == (
        len(encoded.ids),
        sum(label != IGNORE for label in encoded.labels[:window]),
    )


def with_template(tokenizer, change):
    """A `Template` of ChatML whose texts go through a filter of Jinja's."""
    made = Template(tokenizer, "model")
    made.jinja = made.jinja.replace("m['content']", f"m['content'] | {change}")
    return made


TEMPLATES = {
    "model": lambda tokenizer: Template(tokenizer, "model"),
    "vicuna_v1.1": Template,
    "stripping": lambda tokenizer: with_template(tokenizer, "trim"),
    "changing": lambda tokenizer: with_template(tokenizer, "upper"),
}


@pytest.fixture
def piece(tmp_path):
    """A file with a piece of an answer, which is context up to its tenth character."""
    item = conversation("a\33[2Jb", "Tell me.", "It began and it went on.", label_from=9)
    return save(tmp_path / "pieces.json", [conversation("0", "Hello?", "Hi."), item])


def test_show_marks_what_is_learned_with_signs(piece):
    done = run_script(INSPECT, "--in", piece, "--show", "1")
    assert done.returncode == 0, done.stderr
    assert "It began ⟦and it went on.⟧\n" in done.stdout
    assert "⟦Tell" not in done.stdout
    assert "goes on from an earlier piece" in done.stdout
    assert "\33" not in done.stdout
    by_id = run_script(INSPECT, "--in", piece, "--show", "a\33[2Jb")
    assert by_id.stdout == done.stdout


def test_show_tells_what_a_file_lost_before_the_conversation(tmp_path):
    sound = [json.dumps(conversation(name, "Hello?", "Hi.")) for name in "abc"]
    path = tmp_path / "cut.json"
    path.write_text(f"[{sound[0]}, {sound[1][:-20]}, {sound[2]}]")
    for wanted in ("1", "c"):
        done = run_script(INSPECT, "--in", path, "--salvage", "--show", wanted)
        assert done.stdout.startswith("conversation 1 · c · ")
        assert done.stderr.startswith(f"salvaged: {path}: conversation 1 (byte ")


def test_an_id_of_digits_is_found_where_no_conversation_has_that_number(tmp_path):
    items = [42, conversation("1", "Hello?", "Hi."), conversation("777", "Hello?", "Ho.")]
    path = save(tmp_path / "c.json", items)
    for wanted, index in (("1", 1), ("2", 2), ("777", 2)):
        done = run_script(INSPECT, "--in", path, "--show", wanted)
        assert done.stdout.startswith(f"conversation {index} · ")
    unsound = run_script(INSPECT, "--in", path, "--show", "0")
    assert f"{path}: conversation 0 (byte 1): not an object" in unsound.stderr


def test_what_turns_text_around_is_shown_as_it_is_escaped():
    assert terminal.visible("a\33b\u202ec\x9b") == "a\\x1bb\\u202ec\\x9b"


@pytest.mark.parametrize("no_colour", [{}, {"NO_COLOR": "1"}], ids=["colour", "no colour"])
def test_show_colours_a_terminal_unless_told_not_to(piece, no_colour):
    master, terminal = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    subprocess.run(
        [sys.executable, ROOT / INSPECT, "--in", piece, "--show", "1"],
        env={**environment, **no_colour},
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    os.close(terminal)
    text = os.read(master, 100_000).decode()
    os.close(master)
    assert ("\33[32mand it went on." in text) is not no_colour
    assert ("\33" not in text) is bool(no_colour)
    assert ("⟦" in text) is bool(no_colour)
    assert "\33[2J" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--in", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["--show", "nobody"], "no conversation has the number or id 'nobody'"),
        (["--show", "2"], "no conversation has the number or id '2'"),
        (["--model-name", "nowhere"], "nowhere: no such folder, expected a model's"),
        (["--html", "nowhere/page.html"], "nowhere/page.html: No such file or directory"),
    ],
)
def test_errors_are_lines(piece, flags, message):
    done = run_script(INSPECT, "--in", piece, *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_empty_file_has_a_report(tmp_path):
    path, page = save(tmp_path / "none.json", []), tmp_path / "page.html"
    done = run_script(INSPECT, "--in", path, "--html", page)
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout)["conversations"] == "0 with 0 pairs"
    assert "All 0." in page.read_text(encoding="utf-8")


def test_the_chain_is_found_and_told(chain):
    """From another folder than the stages ran in, and with the books of each as it left them."""
    stages = ["merge", "clean_sharegpt", "optional_clean", "split_long_conversation"]
    steps = flow.steps(str(chain / "split_long_conversation.json"))
    assert [step.name for step in steps] == stages
    for before, after in pairwise(steps):
        assert before.account["written"] == after.account["read"]
    merge, clean, language, _ = steps
    assert merge.reasons() == [("no list of turns", 1)]
    (example,) = merge.examples["no list of turns"]
    assert (example.id, "</script><img src=x" in example.excerpt) == ("none", True)
    assert "blocked phrase" in dict(clean.reasons())
    (blocked, *_) = [one for one in clean.examples["blocked phrase"] if one.id == "blocked"]
    assert "I am ChatGPT" in blocked.excerpt
    assert set(language.examples) == set(dict(language.reasons()))
    assert all(1 <= len(found) <= flow.EXAMPLES for found in language.examples.values())


def test_a_stage_that_wrote_over_its_input_is_told_once(tmp_path):
    path = save(tmp_path / "a.json", [conversation("a", "b", "c")])
    run_script("fastchat/data/merge.py", "--in", path, "--out", path)
    assert [step.name for step in flow.steps(str(path))] == ["merge"]


def test_a_chain_over_several_folders_is_found_from_any(tmp_path, monkeypatch):
    """In each folder there is a `merged.json`, and an account beside it."""
    for name in ("raw", "deep/made", "other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "made").symlink_to(tmp_path / "deep" / "made")
    raw = save(tmp_path / "raw" / "raw.json", [conversation("a", "b", "c")])
    first, other = tmp_path / "raw" / "merged.json", tmp_path / "other" / "merged.json"
    run_script("fastchat/data/merge.py", "--in", raw, "--out", first)
    run_script("fastchat/data/merge.py", "--in", raw, "--out", other, "--limit", "1")
    made = tmp_path / "made" / "merged.json"
    run_script(CLEAN, "--in", first, "--out", made, "--rejected", tmp_path / "raw" / "no.json")
    monkeypatch.chdir(tmp_path / "other")
    for path in (os.path.relpath(made), str(tmp_path / "deep" / "made" / "merged.json")):
        steps = flow.steps(path)
        assert [step.name for step in steps] == ["merge", "clean_sharegpt"]
        assert steps[0].account["options"]["limit"] is None


def test_the_held_out_share_has_its_account(tmp_path):
    items = [conversation(f"{n}", f"Question {n}?", f"Answer {n}.") for n in range(40)]
    path, out = save(tmp_path / "raw.json", items), tmp_path / "out.json"
    run_script("fastchat/data/merge.py", "--in", path, "--out", out, "--split-eval", 0.5)
    (step,) = flow.steps(str(tmp_path / "out.eval.json"))
    assert (step.account["read"], step.account["seen"]) == (40, {"held out": 20})


def test_no_output_replaces_an_input(piece):
    before = piece.read_bytes()
    for script, *flags in (
        (INSPECT, "--html", piece),
        (
            CLEAN,
            "--out",
            piece.with_name("out.json"),
            "--rejected",
            piece.parent / "." / piece.name,
        ),
    ):
        done = run_script(script, "--in", piece, *flags)
        assert done.returncode == 1
        assert f"{piece}: {flags[-2]} would replace this input" in done.stderr
        assert piece.read_bytes() == before


@pytest.mark.parametrize("account", ["{", "[]", '{"stage": "merge.py", "inputs": [3]}', "null"])
def test_a_broken_account_is_bad_input(piece, account):
    piece.with_name("pieces.json.account").write_text(account)
    with pytest.raises(InputError, match="pieces.json.account: expected the account of a stage"):
        flow.steps(str(piece))


def test_a_page_that_cannot_be_made_leaves_the_old_one(piece):
    piece.with_name("pieces.json.account").write_text("{")
    page = piece.with_name("page.html")
    page.write_text("old")
    done = run_script(INSPECT, "--in", piece, "--html", page)
    assert done.returncode == 1
    assert not done.stdout  # told before the survey, which can take long
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
        run_script(INSPECT, "--in", path, "--html", page, "--sample", count)
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

        page.run("document.querySelector('#search').value = 'goes on in another piece'")
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
