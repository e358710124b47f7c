"""Runs that are killed, stopped or out of room leave the old output or the new one, no more."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from llama_lora.cli import InputError
from llama_lora.corpus.records.atomic_files import Outputs, replacing
from tests.conftest import ROOT, run_script

STAGES = {
    "merge": ("fastchat/data/merge.py",),
    "shuffle": ("fastchat/data/merge.py", "--shuffle", "1"),
    "clean": ("fastchat/data/clean_sharegpt.py",),
    "filter": ("fastchat/data/optional_clean.py", "--skip-lang", "fr"),
}
SPLIT = "fastchat/data/split_long_conversation.py"
OLD = "old"


def conversation(number, size=200):
    answer = f"This is the answer with the number {number}. " * (size // 40)
    turns = [
        {"from": "human", "value": f"What is number {number}?"},
        {"from": "gpt", "value": answer},
    ]
    return {"id": str(number), "conversations": turns}


MANY = b",".join([json.dumps(conversation(0)).encode()] * 10_000)


def corpus(folder, count=4000, size=200) -> Path:
    path = folder / "in.json"
    path.write_text(json.dumps([conversation(number, size) for number in range(count)]))
    return path


def start(stage, source, target, *flags, **options) -> subprocess.Popen:
    """A stage under way, in a group of processes of its own."""
    script = STAGES.get(stage, [SPLIT])
    command = [sys.executable, *script, "--in", source, "--out", target, "--workers", "2"]
    return subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What runs in the background of a script ignores Ctrl-C, and its children with it.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def is_group_gone(group: int) -> bool:
    """Whether no process of the group that a run started is left, within seconds."""
    deadline = time.monotonic() + 20
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
        return False
    return True


def workers_of(run: subprocess.Popen) -> list[int]:
    """The processes that a run has started to work for it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == run.pid and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def under_way(tmp_path, stage="merge"):
    """A run whose input is a pipe with more to come, so it is in its midst for as long as we like.

    What it was given is more than a pipe holds, so it has begun to read.
    """
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    os.mkfifo(source)
    target.write_text(OLD)
    run = start(stage, source, target)
    pipe = os.open(source, os.O_WRONLY)
    os.write(pipe, b"[" + MANY)
    return run, pipe


def feed(pipe: int) -> None:
    """Give a run more to read until it ends, within a minute."""
    deadline = time.monotonic() + 60
    with suppress(BrokenPipeError):
        while time.monotonic() < deadline:
            os.write(pipe, b"," + MANY)
    os.close(pipe)


@pytest.mark.parametrize("stage", ["merge", "clean"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_the_old_file_and_no_process(tmp_path, number, stage):
    run, pipe = under_way(tmp_path, stage)
    if number == signal.SIGKILL:
        run.kill()
    else:
        os.killpg(run.pid, number)  # as a terminal does
    feed(pipe)
    printed, message = run.communicate(timeout=20)
    assert (run.returncode, printed) == ({2: 130, 15: 143, 9: -9}[number], "")
    assert message == {2: "error: interrupted\n", 15: "error: terminated\n", 9: ""}[number]
    assert (tmp_path / "out.json").read_text() == OLD
    assert sorted(os.listdir(tmp_path)) == ["in.json", "out.json"]
    assert is_group_gone(run.pid)


def test_a_run_stopped_while_its_workers_start_says_one_line(tmp_path):
    run = start("merge", corpus(tmp_path), tmp_path / "out.json")
    while not workers_of(run):
        time.sleep(0.001)
    os.killpg(run.pid, signal.SIGINT)
    assert run.communicate(timeout=20) == ("", "error: interrupted\n")
    assert (run.returncode, os.listdir(tmp_path)) == (130, ["in.json"])
    assert is_group_gone(run.pid)


def test_workers_that_are_killed_are_reported_with_the_conversation_if_at_one(tmp_path):
    run, pipe = under_way(tmp_path)
    workers = workers_of(run)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    feed(pipe)
    printed, message = run.communicate(timeout=20)
    assert (run.returncode, printed, message.count("\n")) == (1, "", 1)
    assert re.match(r"error: (\S+/in.json: conversation \d+ |a process died between)", message)
    assert message.endswith("(signal SIGKILL); nothing was written\n")
    assert (tmp_path / "out.json").read_text() == OLD
    assert sorted(os.listdir(tmp_path)) == ["in.json", "out.json"]


def killed_at_random(tmp_path, stage, times, *flags):
    """Kill a stage that often, at moments spread over its whole time, and until a kill has hit."""
    source, target = corpus(tmp_path), tmp_path / "out.json"
    flags = ["--rejected", tmp_path / "rejected.jsonl", *flags]
    begun = time.monotonic()
    whole = start(stage, source, target, *flags)
    whole.communicate(timeout=300)
    assert whole.returncode == 0
    lasted, new = time.monotonic() - begun, target.read_bytes()
    names = sorted(os.listdir(tmp_path))
    choose, runs, killed = random.Random(stage), 0, 0
    while runs < times or not killed:
        target.write_text(OLD)
        run = start(stage, source, target, *flags)
        time.sleep(choose.uniform(0.3, 1.05) * lasted)
        run.kill()
        run.communicate(timeout=20)
        runs += 1
        if run.returncode == -signal.SIGKILL:
            killed += 1
        else:
            lasted *= 0.9  # it takes less than was thought
        assert target.read_bytes() in (OLD.encode(), new)
        # Killed in the moment between a file's getting its name and its taking its place, the file
        # is there, whole, under that name: the next run takes it away.
        left = set(os.listdir(tmp_path)) - set(names)
        assert all(name.endswith(".part") for name in left), left
        assert is_group_gone(run.pid)
    last = start(stage, source, target, *flags)
    last.communicate(timeout=300)
    assert last.returncode == 0
    assert (target.read_bytes(), sorted(os.listdir(tmp_path))) == (new, names)


def test_kill_9_leaves_the_old_output_or_the_new_one(tmp_path):
    killed_at_random(tmp_path, "shuffle", 3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_many_times_leaves_the_old_output_or_the_new_one(tmp_path, stage):
    killed_at_random(tmp_path, stage, 15)


@pytest.mark.slow
def test_kill_9_of_a_split_leaves_the_old_output_or_the_new_one(
    tmp_path, tmp_path_factory, byte_tokenizer
):
    model = tmp_path_factory.mktemp("model")
    byte_tokenizer.save_pretrained(model)
    flags = ("--model-name", model, "--template", "model", "--max-length", "128")
    killed_at_random(tmp_path, "split", 15, *flags)


# ------------------------------------------------------------------ no room


def assert_no_room(done, folder, message, target):
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr == f"error: {target}: {message}; nothing was changed\n"
    assert target.read_text() == OLD
    assert sorted(os.listdir(folder)) == ["out.json"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_too_large_is_one_line_and_leaves_the_old_one(tmp_path, stage):
    source = corpus(tmp_path, 900, 5000)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "out.json"
    target.write_text(OLD)
    command = [sys.executable, *STAGES[stage], "--in", source, "--out", target, "--workers", "1"]
    done = run_script("bash", "-c", 'ulimit -f 2048; exec "$@"', "bash", *command)
    assert_no_room(done, target.parent, "File too large", target)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("stage", ["merge", "clean"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, small_disk, stage):
    target = small_disk / "out.json"
    target.write_text(OLD)
    source = corpus(tmp_path, 900, 5000)
    command = [*STAGES[stage], "--in", source, "--out", target, "--workers", "1"]
    assert_no_room(run_script(*command), small_disk, "No space left on device", target)


def test_of_several_outputs_none_changes_when_one_finds_no_room(tmp_path, small_disk):
    """The rejected file is elsewhere and complete; it must not stand beside an old output."""
    target, rejected = small_disk / "out.json", tmp_path / "rejected.jsonl"
    target.write_text(OLD)
    rejected.write_text(OLD)
    source = corpus(tmp_path, 900, 5000)
    command = [*STAGES["merge"], "--in", source, "--out", target, "--workers", "1"]
    done = run_script(*command, "--rejected", rejected)
    assert_no_room(done, small_disk, "No space left on device", target)
    assert rejected.read_text() == OLD


def test_a_device_is_no_output_and_a_full_one_no_place_to_print(tmp_path):
    source, target = corpus(tmp_path, 10), tmp_path / "out.json"
    done = run_script(*STAGES["merge"], "--in", source, "--out", "/dev/full")
    message = "error: /dev/full: cannot be written: it is not a regular file\n"
    assert (done.returncode, done.stderr) == (1, message)
    command = [sys.executable, *STAGES["merge"], "--in", source, "--out", target]
    done = run_script("bash", "-c", 'exec "$@" > /dev/full', "bash", *command)
    message = "error: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, message)
    assert len(json.loads(target.read_text())) == 10


# ------------------------------------------------------------------ names


def write(path, text=b"new"):
    with replacing(str(path)) as file:
        file.write(text)


def test_what_a_killed_run_left_under_its_name_is_taken_away(tmp_path):
    (tmp_path / "a.json.part").write_text("whole, but never put in its place")
    write(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_two_runs_at_once_each_leave_a_whole_file(tmp_path):
    path = tmp_path / "a.json"
    with replacing(str(path)) as file:
        file.write(b"late")
        write(path, b"early")
        assert path.read_bytes() == b"early"
    assert path.read_bytes() == b"late"
    assert os.listdir(tmp_path) == ["a.json"]


def test_without_nameless_files_one_stands_beside_its_place(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")  # as other systems and some file systems are
    path, part = tmp_path / "a.json", tmp_path / "a.json.part"
    part.write_text("left by a killed run, longer than what is written now")
    with replacing(str(path)) as file:
        file.write(b"new")
        assert os.listdir(tmp_path) == ["a.json.part"]
        with pytest.raises(InputError, match="another run is writing it"):
            write(path)
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyboardInterrupt):
        interrupted(str(path))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]


def interrupted(path):
    with Outputs() as outputs:
        outputs.corpus(path).write(b"1")
        outputs.scratch(path).write(b"2")
        raise KeyboardInterrupt


def test_two_outputs_are_two_files(tmp_path):
    done = run_script(
        *STAGES["merge"], "--in", corpus(tmp_path, 1), "--out", tmp_path / "a", "--rejected",
        tmp_path / "." / "a.account",
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "two outputs cannot be written to one file" in done.stderr
    assert os.listdir(tmp_path) == ["in.json"]
