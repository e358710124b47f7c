"""Corpus files: streaming in, every kind of damage, and files that appear whole or not at all."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_lora.cli import InputError
from llama_lora.corpus import files

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
    return [json.loads(record.raw) for record in files.read(str(path), **options)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_records(tmp_path, form, packed):
    path = tmp_path / "corpus"  # the name says nothing, the content does
    path.write_bytes(gzip.compress(FORMS[form]) if packed else FORMS[form])
    assert contents(path) == ITEMS


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
    found = list(files.array_items(iter(blocks), 0))
    assert [json.loads(raw) for _, raw in found] == items
    for offset, raw in found:
        if raw[:1] in b"{[":
            assert text[offset : offset + len(raw)] == raw


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_what_is_dumped_is_parsed_back(value):
    assert files.parse(files.dump(value))[0] == value


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'{"a": NaN, "b": -Infinity, "c": 1e999}', {"a": None, "b": None, "c": None}),
        (b'"\\ud800x"', "\ud800x"),
        (b'"tab\there"', "tab\there"),
    ],
)
def test_leniency_is_told(raw, value):
    assert files.parse(raw) == (value, True)
    json.loads(files.dump(value).decode())  # valid UTF-8 and JSON, whatever was in it


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
    "cut gzip": (gzip.compress(os.urandom(9999).hex().encode())[:-400], "gzipped data is damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_file_is_one_line_and_changes_nothing(tmp_path, fault):
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    text, message = FAULTS[fault]
    source.write_bytes(text)
    target.write_text("old")
    with pytest.raises(InputError, match=message):
        contents(source)
    done = run_script(MERGE, "--in", source, "--out", target)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert str(source) in done.stderr
    assert target.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["in.json", "out.json"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_reports_damage_and_missing_files_alike(tmp_path, script):
    (tmp_path / "cut.json").write_bytes(CUT[:-20])
    for source, message in [
        ("cut.json", "--salvage keeps the 2"),
        ("none", "No such"),
        ("", "Is a"),
    ]:
        done = run_script(script, "--in", tmp_path / source, "--out", tmp_path / "out.json")
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
    done = run_script(MERGE, "--in", source, "--out", target, "--salvage")
    assert done.returncode == 0
    assert done.stderr.count("salvaged: ") == 2
    assert done.stdout.splitlines()[-1] == "read 4 · kept 4 · rejected 0"


def test_salvage_of_nothing_is_an_error(tmp_path):
    path = tmp_path / "in.json"
    path.write_bytes(b'[{"id": "a", "conversa')
    with pytest.raises(InputError, match="not one complete conversation"):
        contents(path, salvage=True)


def test_memory_is_flat_and_an_endless_record_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST", 1 << 20)
    path = tmp_path / "in.json"
    path.write_bytes(b'[{"id": "a"}, {"id": "' + b"x" * (4 << 20))
    with pytest.raises(InputError, match="conversation 1 .*does not end within 1 MB"):
        contents(path)


# ---------------------------------------------------------------------------------------- writing


def write(path, *lines):
    with files.writing(str(path)) as out:
        for line in lines:
            out.write(line)


def test_written_files_hold_one_conversation_a_line(tmp_path):
    for name, lines, text in [
        ("a.json", (b"1", b"2"), "[\n1,\n2\n]\n"),
        ("b.json", (), "[]\n"),
        ("a.jsonl", (b"1", b"2"), "1\n2\n"),
        ("b.jsonl", (), ""),
    ]:
        write(tmp_path / name, *lines)
        assert (tmp_path / name).read_text() == text
    assert len(os.listdir(tmp_path)) == 4


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(AttributeError), files.writing(str(path)) as out:
        out.write(b"1") or out.no_such_thing  # noqa: B018
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_a_killed_run_left_is_taken_over_and_a_running_one_is_respected(tmp_path):
    path, part = tmp_path / "a.json", tmp_path / "a.json.part"
    part.write_text("left by a killed run, longer than what is written now")
    write(path, b"1")
    assert path.read_text() == "[\n1\n]\n"
    with files.writing(str(path)), pytest.raises(InputError, match="another run is writing it"):
        write(path)
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(("out", "message"), [("no/a.json", "No such file"), ("", "not a regular")])
def test_where_nothing_can_be_written_is_said(tmp_path, out, message):
    with pytest.raises(InputError, match=message):
        write(tmp_path / out)


def test_a_link_is_written_through_and_the_input_may_be_the_output(tmp_path):
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    path.write_bytes(ARRAY)
    link.symlink_to(path)
    done = run_script(MERGE, "--in", link, path, "--out", link)
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


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps([conversation(str(i), answer="x" * 5000) for i in range(900)]))
    target.write_text("old")
    limited = f"ulimit -f 2048; exec {sys.executable} {MERGE} --in {source} --out {target}"
    done = subprocess.run(
        ["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "File too large" in done.stderr
    assert target.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["in.json", "out.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_the_old_file_and_no_process(tmp_path, number):
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    os.mkfifo(source)  # the run waits for more of it, so it is always in its midst
    target.write_text("old")
    command = [sys.executable, MERGE, "--in", source, "--out", target, "--workers", "2"]
    run = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with open(source, "wb") as pipe:
        pipe.write(b"[" + b",".join([json.dumps(ITEMS[0]).encode()] * 20000))
        pipe.flush()
        while not (tmp_path / "out.json.part").exists():
            time.sleep(0.02)
        time.sleep(0.5)
        run.send_signal(number)
        run.wait(timeout=20)
    message = run.stderr.read()
    assert run.returncode == {2: 130, 15: 143, 9: -9}[number]
    assert "Traceback" not in message
    assert target.read_text() == "old"
    left = {"in.json", "out.json"} | ({"out.json.part"} if number == signal.SIGKILL else set())
    assert set(os.listdir(tmp_path)) == left
    deadline = time.monotonic() + 10
    while group_alive(run.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_alive(run.pid)


def group_alive(group: int) -> bool:
    """Whether a process of the group that the run started is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
