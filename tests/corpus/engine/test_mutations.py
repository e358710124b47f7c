"""Damaged corpus files through every stage: one clear line, or every conversation accounted for."""

import argparse
import gzip
import json
import os
import tempfile
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_lora.cli import InputError
from llama_lora.corpus.clean.cleaner import Cleaner, blocked_phrases
from llama_lora.corpus.duplicates.deduplicate import Deduplicator
from llama_lora.corpus.duplicates.merge import as_it_is
from llama_lora.corpus.engine import stage
from llama_lora.corpus.language.filter import Filter
from llama_lora.corpus.records import formats, reader
from llama_lora.corpus.records.conversation import count_pairs
from llama_lora.corpus.records.json_values import parse
from llama_lora.corpus.split.splitter import Splitter
from tests.corpus.records.test_reader import CUT, FAULTS

STAGES = "merge", "clean", "filter", "split"
OLD = "old"
numbers = count()

TURNS = [
    {"from": "human", "value": 'How do I print "a\\b" in C++?\n\n#include <iostream>'},
    {"from": "gpt", "value": '<div class="markdown prose"><p>So: <code>x</code> é 你好</p></div>'},
    {"from": "human", "value": "And 1234567890?"},
    {
        "from": "gpt",
        "value": "```python\nprint({'[': \"]\"})\n```\n" + "That is all there is. " * 30,
    },
]
ITEMS = [
    {"id": "a", "conversations": TURNS[:2]},
    {"id": 7, "model": "m", "conversations": [{"from": "system", "value": "Be brief."}, *TURNS]},
    {"instruction": "Add.", "input": "1 and 2", "output": "3", "score": 1.5},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"id": None, "conversations": TURNS[2:], "other": [1, {"x": []}, None, True]},
]
# What stands where another value stood, as it is written in JSON, or is not.
VALUES = [
    *("null", "true", "0", "-1.5", "[]", "{}", '""', '"text"', "[null]", '{"a": [{}]}'),
    *("NaN", "-Infinity", "1e999", "9" * 30, "9" * 5000, "-0", "1E400", "01", "+1", "undefined"),
    *('"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\x"', "'text'", '"\ttab"', '"line\nbreak"'),
    *("[" * 300 + "]" * 300, "[" * 3000 + "]" * 3000, '{"a":' * 1500 + "1" + "}" * 1500),
]
TOKENS = [
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b" ", b"\0", b"\xff", b"\xe4\xbd"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b'"id": 1, ', b'{"id": "b"}', b"\\u12", b"]["),
]

places = st.integers(0, 5000)


def paths(value, path=()):
    """The places of all values in `value`."""
    yield path
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, item in inner:
        yield from paths(item, (*path, key))


def with_value(item, place, raw):
    """The JSON of `item` with `raw` in the place of one of its values."""
    every = list(paths(item))
    *way, last = every[1:][place % len(every[1:])]
    changed = json.loads(json.dumps(item))
    holder = changed
    for key in way:
        holder = holder[key]
    holder[last] = "@@"
    return json.dumps(changed, ensure_ascii=place % 2 == 0).replace('"@@"', raw)


@st.composite
def texts(draw):
    """A corpus file, sound but for some of its values."""
    items = draw(st.lists(st.sampled_from(ITEMS), min_size=1, max_size=4))
    texts = [json.dumps(item, ensure_ascii=draw(st.booleans())) for item in items]
    for number, item in enumerate(items):
        if draw(st.booleans()):
            texts[number] = with_value(item, draw(places), draw(st.sampled_from(VALUES)))
    form = draw(st.sampled_from(["[%s]", "[\n%s\n]\n", " [ %s ]", "lines", "lines\n"]))
    if form.startswith("lines"):
        return "\n".join(texts).encode("utf-8", "surrogatepass") + form[5:].encode()
    return (form % ",\n".join(texts)).encode("utf-8", "surrogatepass")


@st.composite
def edited(draw, text):
    """`text` with some bytes changed, lost, doubled, put in, or cut off."""
    for _ in range(draw(st.integers(0, 4))):
        place, size = draw(places) % (len(text) + 1), draw(st.integers(1, 60))
        before, part, after = text[:place], text[place : place + size], text[place + size :]
        kind = draw(st.sampled_from(["flip", "lose", "double", "put in", "cut"]))
        if kind == "flip":
            part = bytes([part[0] ^ 1 << size % 8]) + part[1:] if part else b""
        elif kind == "lose":
            part = b""
        elif kind == "double":
            part += part
        elif kind == "put in":
            part = draw(st.sampled_from(TOKENS)) + part
        else:
            part, after = b"", b""
        text = before + part + after
    return text


@st.composite
def damaged_files(draw):
    """The bytes of a corpus file that went through much."""
    text = draw(edited(draw(texts())))
    wrapping = draw(st.sampled_from(["plain", "plain", "mark", "UTF-16", "gzip", "gzip"]))
    if wrapping == "mark":
        return b"\xef\xbb\xbf" + text
    if wrapping == "UTF-16":
        return text.decode(errors="replace").encode("utf-16")
    return draw(edited(gzip.compress(text, mtime=0))) if wrapping == "gzip" else text


@pytest.fixture(scope="session")
def folder():
    """A folder in memory where there is one: thousands of files are flushed to the disk."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def processes(tmp_path_factory, byte_tokenizer):
    """What each stage does to a conversation, and how it arranges them."""
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer.save_pretrained(tokenizer)
    return {
        "merge": (as_it_is, None),
        "clean": (Cleaner(blocked_phrases(None)), Deduplicator),
        "filter": (Filter(skip=["fr"]), None),
        "split": (Splitter(str(tokenizer), 128, "model", "continue"), None),
    }


def run(name, processes, folder, data, salvage=False):
    """Run a stage on a file of `data` in this process; the account, or the line of the error.

    Whatever came of it is checked against what any run owes.
    """
    process, arrange = processes[name]
    source, out, rejected = (folder / n for n in ("in", "out.json", "rejected.jsonl"))
    source.write_bytes(data)
    out.write_text(OLD)
    args = argparse.Namespace(
        inputs=str(source), out=str(out), rejected=str(rejected), workers=1, salvage=salvage,
        begin=0, end=None,
    )  # fmt: skip
    before = set(os.listdir(folder))
    try:
        account = stage.run(args, lambda: process, arrange and arrange(str(out)))
    except InputError as error:
        line = str(error)
        assert line.startswith(f"{source}: ")
        assert out.read_text() == OLD
        assert set(os.listdir(folder)) == before
        return line
    assert account.read == account.kept + account.rejected.total()
    assert account.pairs_read == account.pairs_kept + account.pairs_rejected.total()
    assert set(os.listdir(folder)) == {"in", "out.json", "out.json.account", "rejected.jsonl"}
    kept = json.loads(out.read_text(encoding="utf-8"))
    lines = rejected.read_text(encoding="utf-8").splitlines()
    assert [len(kept), len(lines)] == [account.written, account.rejected.total()]
    assert all("reason" in json.loads(line) for line in lines)
    again = [formats.read(parse(record.raw)[0]) for record in reader.read(str(out))]
    assert [conversation for conversation, _, _ in again] == kept
    assert not any(repairs.total() for _, repairs, _ in again)
    if name != "split":  # which may spread a pair over pieces
        assert account.pairs_kept == sum(count_pairs(item["conversations"]) for item in kept)
    for path in (rejected, Path(f"{out}.account")):
        path.unlink()
    return account


def survives(name, processes, folder, data, salvage):
    outcome = run(name, processes, folder, data, salvage)
    if isinstance(outcome, str):
        assert outcome.isprintable()


MUTATED = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "derandomize": True,
}


@pytest.mark.parametrize("name", STAGES)
@settings(max_examples=75, **MUTATED)
@given(data=damaged_files(), salvage=st.booleans())
def test_damaged_files(name, processes, folder, data, salvage):
    survives(name, processes, folder, data, salvage)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
@settings(max_examples=5000, **MUTATED)
@given(data=damaged_files(), salvage=st.booleans())
def test_many_damaged_files(name, processes, folder, data, salvage):
    survives(name, processes, folder, data, salvage)


@pytest.mark.parametrize("name", STAGES)
def test_undamaged_files_are_read_whole(name, processes, folder):
    """The files above are ones that the stages can read, before the damage."""
    account = run(name, processes, folder, json.dumps(ITEMS).encode())
    assert (account.read, account.rejected.total()) == (5, 0)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_file_is_one_line_from_every_stage(name, processes, folder, fault):
    data, message = FAULTS[fault]
    with pytest.raises(InputError, match=message):
        raise InputError(run(name, processes, folder, data))


@pytest.mark.parametrize("name", STAGES)
def test_salvage_says_the_same_from_every_stage(name, processes, folder):
    account = run(name, processes, folder, CUT[:-20], salvage=True)
    assert account.read == 2
