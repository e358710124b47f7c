"""One conversation as training reads it: what is marked as learned is what is learned."""

import json
import os
import pty
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_lora.model.labels import IGNORE
from llama_lora.model.template import Template
from llama_lora.report import terminal
from llama_lora.report.conversation_view import BEYOND, PLAIN, TRAINED, view
from tests.conftest import ROOT
from tests.corpora import conversation, save
from tests.report.inspected import INSPECT, inspect

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


def test_show_marks_what_is_learned_with_signs(piece):
    done = inspect("--in", piece, "--show", "1")
    assert done.returncode == 0, done.stderr
    assert "It began ⟦and it went on.⟧\n" in done.stdout
    assert "⟦Tell" not in done.stdout
    assert "continues an earlier piece" in done.stdout
    assert "\33" not in done.stdout
    by_id = inspect("--in", piece, "--show", "a\33[2Jb")
    assert by_id.stdout == done.stdout


def test_show_tells_what_a_file_lost_before_the_conversation(tmp_path):
    sound = [json.dumps(conversation(name, "Hello?", "Hi.")) for name in "abc"]
    path = tmp_path / "cut.json"
    path.write_text(f"[{sound[0]}, {sound[1][:-20]}, {sound[2]}]")
    for wanted in ("1", "c"):
        done = inspect("--in", path, "--salvage", "--show", wanted)
        assert done.stdout.startswith("conversation 1 · c · ")
        assert done.stderr.startswith(f"salvaged: {path}: conversation 1 (byte ")


def test_an_id_of_digits_is_found_where_no_conversation_has_that_number(tmp_path):
    items = [42, conversation("1", "Hello?", "Hi."), conversation("777", "Hello?", "Ho.")]
    path = save(tmp_path / "c.json", items)
    for wanted, index in (("1", 1), ("2", 2), ("777", 2)):
        done = inspect("--in", path, "--show", wanted)
        assert done.stdout.startswith(f"conversation {index} · ")
    unsound = inspect("--in", path, "--show", "0")
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
