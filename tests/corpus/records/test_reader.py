"""Corpus files: streaming in, every kind of damage, and files that appear whole or not at all."""

import gzip
import json
import os
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_lora.cli import InputError
from llama_lora.corpus.records import reader, scanner
from llama_lora.corpus.records.atomic_files import Outputs
from llama_lora.corpus.records.json_values import dump, parse
from tests.conftest import run_here

MERGE = "fastchat/data/merge.py"
SCRIPTS = [f"fastchat/data/{name}.py" for name in ("merge", "clean_sharegpt", "optional_clean")]


def conversation(name="a", question="What?", answer="That."):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns}


ITEMS = [
    conversation("a", 'quotes " and \\ and \\" and {[', "]} 中文 \u2028 \U0001f600"),
    conversation("b", "", "\\"),
    {**conversation("c"), "other": [1, {"x": []}, None, "}"]},
]
ARRAY = json.dumps(ITEMS).encode()
FORMS = {
    "compact": json.dumps(ITEMS, separators=(",", ":")).encode(),
    "pretty": json.dumps(ITEMS, indent=2, ensure_ascii=False).encode(),
    "byte-order mark": b"\xef\xbb\xbf" + ARRAY,
    "leading space": b" \n\t" + ARRAY + b"\n\n",
    "lines": "\n".join(map(json.dumps, ITEMS)).encode(),
    "lines, CRLF, blank lines": "\r\n\r\n".join(json.dumps(item) for item in ITEMS).encode()
    + b"\n",
    "no commas": b"[" + b" ".join(json.dumps(item).encode() for item in ITEMS) + b"]",
    "comma at the end": ARRAY[:-1] + b",]",
}


def contents(path, **options):
    return [json.loads(record.raw) for record in reader.read(str(path), **options)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_records(tmp_path, form, packed):
    path = tmp_path / "corpus"  # the name says nothing, the content does
    path.write_bytes(gzip.compress(FORMS[form]) if packed else FORMS[form])
    assert contents(path) == ITEMS


def test_commas_that_are_not_as_in_json_are_told_where_they_are(tmp_path):
    path = tmp_path / "in.json"
    path.write_text('[{"a":1}{"b":2},,{"c":3}, {"d":4} 5 , 6,{"e":7},]')
    told = [(json.loads(record.raw), record.lenient) for record in reader.read(str(path))]
    assert [item for item, lenient in told if lenient] == [{"b": 2}, {"c": 3}, 5, 6, {"e": 7}]
    assert [item for item, lenient in told if not lenient] == [{"a": 1}, {"d": 4}]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(json_values, max_size=5), st.integers(1, 40), st.booleans())
def test_items_are_those_of_a_whole_parse_wherever_blocks_end(items, block, ascii_only):
    text = json.dumps(items, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")[1:]
    blocks, at = [], 0
    while at < len(text):  # as `blocks_of` gives them: none ends inside an escape
        end = at + block
        if (end - at - len(text[at:end].rstrip(b"\\"))) % 2:
            end += 1
        blocks.append(text[at:end])
        at = end
    found = list(scanner.array_items(scanner.Blocks(blocks), 0, strict=True))
    assert [json.loads(item.raw) for item in found] == items
    assert not any(item.lenient for item in found)
    for offset, raw, _ in found:
        if raw[:1] in b"{[":
            assert text[offset : offset + len(raw)] == raw


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_what_is_dumped_is_parsed_back(value):
    assert parse(dump(value))[0] == value


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'{"a": NaN, "b": -Infinity, "c": 1e999}', {"a": None, "b": None, "c": None}),
        (b'"\\ud800x"', "\ud800x"),
        (b'"tab\there"', "tab\there"),
    ],
)
def test_leniency_is_told(raw, value):
    assert parse(raw) == (value, True)
    json.loads(dump(value).decode())  # valid UTF-8 and JSON, whatever was in it


def test_whole_numbers_stay_what_they_are_beyond_64_bits():
    raw = b'{"id":123456789012345678901234567890,"x":[18446744073709551616,-9223372036854775809]}'
    assert parse(raw) == (json.loads(raw), False)
    assert dump(parse(raw)[0]) == raw


CUT = json.dumps(ITEMS, indent=2).encode()
PLACE = r"conversation {} \(byte \d+\): "
FAULTS = {
    "empty": (b"", "the file is empty"),
    "blank": (b" \n ", "the file is empty"),
    "only a mark": (b"\xef\xbb\xbf", "the file is empty"),
    "text": (b"hello", "found text that starts with 'hello'"),
    "UTF-16": ("[]".encode("utf-16"), "UTF-16, expected UTF-8"),
    "an object": (b'{"data": [1]}', 'found an object that starts with "data"'),
    "a pretty object": (b'{\n  "data": [\n1]}', 'found an object that starts with "data"'),
    "cut in a string": (
        CUT[: CUT.rindex(b"That")],
        rf"{PLACE.format(2)}the file ends inside a string",
    ),
    "cut in an object": (CUT[:-5], rf"{PLACE.format(2)}the file ends inside an object"),
    "cut in the array": (
        ARRAY[:-1],
        rf"{PLACE.format(3)}the file ends inside the array",
    ),
    "cut in a line": (FORMS["lines"][:-9], r"conversation 2 .*the file ends inside the line"),
    "two arrays": (ARRAY + ARRAY, r"conversation 3 .*text follows the end of the array"),
    "no JSON": (b"[" + json.dumps(ITEMS[0]).encode() + b", oops]", "found 'oops'"),
    "cut gzip": (gzip.compress(ARRAY)[:-9], "conversation 3 .*the gzipped data ends here"),
    "damaged gzip": (
        gzip.compress(ARRAY)[:-8] + b"\0" * 8,  # the wrong sum of the text
        "conversation 3 .*the gzipped data is damaged here",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_file_is_told(tmp_path, fault):
    source = tmp_path / "in.json"
    text, message = FAULTS[fault]
    source.write_bytes(text)
    with pytest.raises(InputError, match=message):
        contents(source)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_reports_damage_and_missing_files_alike(tmp_path, script):
    (tmp_path / "cut.json").write_bytes(CUT[:-20])
    for source, message in [
        ("cut.json", "--salvage keeps the 2"),
        ("none", "No such"),
        ("", "Is a"),
    ]:
        done = run_here(script, "--in", tmp_path / source, "--out", tmp_path / "out.json")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert message in done.stderr
    assert os.listdir(tmp_path) == ["cut.json"]


def test_salvage_keeps_all_that_is_whole_before_and_after_the_damage(tmp_path):
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    whole = [json.dumps(conversation(str(i), answer="x" * 50)).encode() for i in range(6)]
    whole[2] = whole[2].replace(b'"That', b"").replace(b'"x', b"x")  # a quote is missing
    whole[5] = whole[5][:-30]
    source.write_bytes(b"[" + b",\n".join(whole))
    told = []
    kept = [item["id"] for item in contents(source, salvage=True, report=told.append)]
    assert kept == ["0", "1", "3", "4"]
    assert len(told) == 2
    done = run_here(MERGE, "--in", source, "--out", target, "--salvage")
    assert done.returncode == 0
    assert done.stderr.count("salvaged: ") == 2
    assert done.stdout.splitlines()[-1] == "read 4 · kept 4 · rejected 0"


def items_apart(*damaged):
    """Six conversations of which the third is replaced by `damaged`, as JSON."""
    whole = [json.dumps(conversation(str(number))).encode() for number in range(6)]
    return whole[:2] + list(damaged) + whole[3:]


DAMAGED = {
    "a colon is missing": json.dumps(conversation("2")).encode().replace(b'"id":', b'"id"'),
    "text": b"oops",
    "not UTF-8": json.dumps(conversation("2")).encode().replace(b"What", b"\xff"),
    "cut": json.dumps(conversation("2")).encode()[:40],
}


@pytest.mark.parametrize("form", ["array", "lines"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_salvage_loses_nothing_behind_what_is_not_json(tmp_path, damage, form):
    path, told = tmp_path / "in", []
    items = items_apart(DAMAGED[damage])
    path.write_bytes(b"\n".join(items) if form == "lines" else b"[" + b",\n".join(items) + b"]")
    kept = [item["id"] for item in contents(path, salvage=True, report=told.append)]
    assert (kept, len(told)) == (["0", "1", "3", "4", "5"], 1)


def test_salvage_finds_records_that_begin_with_another_key(tmp_path):
    path = tmp_path / "in.json"
    items = [{"source": "x", **conversation(str(number))} for number in range(4)]
    path.write_text(json.dumps(items).replace('"1", ', '"1 ', 1))
    assert [item["id"] for item in contents(path, salvage=True)] == ["0", "2", "3"]


def test_salvage_keeps_all_that_stands_before_the_damage_of_a_gzipped_file(tmp_path):
    path = tmp_path / "in.json"
    items = [conversation(str(number), os.urandom(400).hex()) for number in range(2000)]
    packed = gzip.compress(json.dumps(items).encode())
    path.write_bytes(packed[:600_000])
    inflater = zlib.decompressobj(31)
    whole = inflater.decompress(packed[:600_000]).count(b'"gpt", "value": "That."}]}')
    assert len(contents(path, salvage=True)) == whole > 900


def test_thousands_of_damages_are_no_harder_than_one(tmp_path):
    path, told = tmp_path / "in.json", []
    one = json.dumps(conversation("a")).encode()
    path.write_bytes(b"[" + b",".join([one, one.replace(b'"id":', b'"id"')] * 3000) + b"]")
    assert len(contents(path, salvage=True, report=told.append)) == len(told) == 3000


def test_a_line_alone_is_a_file_whatever_its_first_key(tmp_path):
    path = tmp_path / "in.jsonl"
    item = {"source": "x", **conversation("a")}
    path.write_text(json.dumps(item))
    assert contents(path) == [item]


def test_salvage_of_nothing_is_an_error(tmp_path):
    path = tmp_path / "in.json"
    path.write_bytes(b'[{"id": "a", "conversa')
    with pytest.raises(InputError, match="no complete conversation"):
        contents(path, salvage=True)


def test_memory_is_flat_and_an_endless_record_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(scanner, "LONGEST", 1 << 20)
    path = tmp_path / "in.json"
    path.write_bytes(b'[{"id": "a"}, {"id": "' + b"x" * (4 << 20))
    with pytest.raises(InputError, match="conversation 1 .*does not end within 1 MB"):
        contents(path)


# ---------------------------------------------------------------------------------------- writing


def write(path, lines=()):
    with Outputs() as outputs:
        out = outputs.corpus(str(path))
        for line in lines:
            out.write(line)


def test_written_files_hold_one_conversation_a_line(tmp_path):
    for name, lines, text in [
        ("a.json", (b"1", b"2"), "[\n1,\n2\n]\n"),
        ("b.json", (), "[]\n"),
        ("a.jsonl", (b"1", b"2"), "1\n2\n"),
        ("b.jsonl", (), ""),
    ]:
        write(tmp_path / name, lines)
        assert (tmp_path / name).read_text() == text
    assert len(os.listdir(tmp_path)) == 4


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def lines():
        yield b"1"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(path, lines())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(("out", "message"), [("no/a.json", "No such file"), ("", "not a regular")])
def test_where_nothing_can_be_written_is_said(tmp_path, out, message):
    with pytest.raises(InputError, match=message):
        write(tmp_path / out)


def test_a_link_is_written_through_and_the_input_may_be_the_output(tmp_path):
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    path.write_bytes(ARRAY)
    link.symlink_to(path)
    done = run_here(MERGE, "--in", link, path, "--out", link)
    assert done.returncode == 0
    assert link.is_symlink()
    assert [item["id"] for item in json.loads(path.read_text())] == [
        "a",
        "b",
        "c",
        "a-2",
        "b-2",
        "c-2",
    ]
