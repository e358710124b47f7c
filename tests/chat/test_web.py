"""The chat in the browser without its page: the answers of both sides, and the script."""

import importlib.util
import signal
import socket
import subprocess
import sys
import urllib.request
from functools import partial
from itertools import zip_longest
from pathlib import Path

import pytest

from llama_lora.chat import web
from llama_lora.cli import InputError
from tests.chat.taught import (
    ADAPTER_ANSWERS,
    BASE_ANSWERS,
    GREEDY,
    SCRIPT,
    WINDOW,
    fed,
    generate,
    said,
)
from tests.chat.web_chat import FIRST, SECOND, alone, free_port, needs_gradio

# The answers, without a page

DEFAULTS = ("", 0, 1, 0, 1, 80)  # system message and sliders


def last(updates) -> tuple:
    """The last of what a question yields: both conversations as text, and the notes."""
    *_, (_, _, left, right, notes) = updates
    return [turn["value"] for turn in left], [turn["value"] for turn in right], notes


@pytest.fixture
def answering(adapters) -> web.Answering:
    return web.Answering(adapters, GREEDY)


def test_both_sides_answer_and_remember(answering, adapters):
    updates = list(answering.ask(FIRST, "one", "base", [], [], *DEFAULTS))
    one, base = ADAPTER_ANSWERS[FIRST], BASE_ANSWERS[FIRST]
    assert last(updates) == ([FIRST, one], [FIRST, base], "")
    early = updates[3]
    assert 0 < len(early[2][1]["value"]) < len(one)
    assert 0 < len(early[3][1]["value"]) < len(base)
    left, right = updates[-1][2:4]
    two = alone(adapters, "two", [*left, said("human", SECOND)])
    updates = list(answering.ask(SECOND, "two", "base", left, right, *DEFAULTS))
    assert last(updates)[0] == [FIRST, one, SECOND, two]
    assert last(updates)[1] == [FIRST, base, SECOND, BASE_ANSWERS[SECOND]]
    updates = answering.retry("one", web.NOTHING, *updates[-1][2:4], *DEFAULTS)
    assert last(updates) == ([FIRST, one, SECOND, ADAPTER_ANSWERS[SECOND]], [], "")


def test_same_adapter_on_both_sides(answering):
    updates = answering.ask(FIRST, "one", "one", [], [], *DEFAULTS)
    assert last(updates) == (*[[FIRST, ADAPTER_ANSWERS[FIRST]]] * 2, "")


def test_what_goes_wrong_is_said_beside_the_answer(answering):
    long = "a " * WINDOW
    left, right, notes = last(answering.ask(long, "one", "base", [], [], *DEFAULTS))
    assert left == right == [long]
    assert notes.startswith("one: the prompt has ")
    assert notes.count("no room for an answer") == 2
    settings = (*DEFAULTS[:-1], 2)
    assert "one: cut off" in last(answering.ask(FIRST, "one", web.NOTHING, [], [], *settings))[2]
    history = [turn for n in range(9) for turn in (said("human", FIRST), said("gpt", str(n) * 30))]
    updates = answering.ask(SECOND, "one", web.NOTHING, history, [], *DEFAULTS)
    assert "no longer fit" in last(updates)[2]


def test_nothing_to_answer_again(answering):
    assert last(answering.retry("one", "base", [], [], *DEFAULTS)) == ([], [], "")


def test_settings_are_used(answering):
    def ask(*settings):
        asked = answering.ask(FIRST, "one", web.NOTHING, [], [], *settings)
        return "".join(last(asked)[0][1:])  # a wild one may end before it begins

    wild = ("", 3.0, 1, 0, 1, 20)
    assert len({ask(*wild) for _ in range(4)}) == 4
    assert ask("", 3.0, 1, 1, 1, 80) == ADAPTER_ANSWERS[FIRST]


def test_system_message_is_in_the_prompt(answering, adapters):
    passes = fed(adapters.model)
    list(answering.ask(FIRST, "one", web.NOTHING, [], [], "Be brief.", *DEFAULTS[1:]))
    turns = [said("system", "Be brief."), said("human", FIRST)]
    assert passes[0] == adapters.first.prompt_ids(turns)


def test_closing_an_answer_closes_its_streams(answering):
    updates = answering.ask(FIRST, "one", "base", [], [], *DEFAULTS)
    for _ in range(5):
        kept = next(updates)
    updates.close()
    asked, answer = kept[2]
    assert ADAPTER_ANSWERS[FIRST].startswith(answer["value"])
    updates = answering.retry("one", "base", [asked, answer], [asked], *DEFAULTS)
    assert last(updates)[:2] == (
        [FIRST, ADAPTER_ANSWERS[FIRST]],
        [FIRST, BASE_ANSWERS[FIRST]],
    )


def test_answers_in_two_tabs_do_not_disturb_each_other(answering):
    tabs = [answering.ask(asked, "one", "base", [], [], *DEFAULTS) for asked in (FIRST, SECOND)]
    kept = [(), ()]
    for updates in zip_longest(*tabs):
        kept = [update or old for update, old in zip(updates, kept, strict=True)]
    for asked, (_, _, left, right, _) in zip((FIRST, SECOND), kept, strict=True):
        assert left[1]["value"] == ADAPTER_ANSWERS[asked]
        assert right[1]["value"] == BASE_ANSWERS[asked]


def test_messages_are_escaped():
    [message] = web.messages([said("gpt", "<b>&amp;\n  x")])
    assert message["content"] == [{"type": "text", "text": "&lt;b&gt;&amp;amp;\n  x"}]


# The script


def test_port_in_use_is_one_line_before_a_model_is_loaded(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = generate("--base_model", tmp_path / "missing", "--web", "--port", port)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: --web: cannot listen on 127.0.0.1, port {port}: Address already in use; choose "
        "another --port\n"
    )
    done = generate("--base_model", tmp_path, "--web", "--host", "203.0.113.1")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "cannot listen on 203.0.113.1" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="gradio is installed")
def test_missing_gradio_is_one_line(tmp_path):
    done = generate("--base_model", tmp_path, "--web", "--port", free_port())
    assert done.returncode == 1
    assert done.stderr == "error: --web needs gradio: pip install -r requirements-web.txt\n"


@needs_gradio
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_script_serves_on_loopback_until_ctrl_c(base, host):
    port, more = free_port(), []
    if host == "::1":
        interfaces = Path("/proc/net/if_inet6")
        if not (interfaces.is_file() and interfaces.read_text()):
            pytest.skip("no IPv6 here")
        more = ["--host", host]
    command = [sys.executable, SCRIPT, "--base_model", base, "--web", "--port", port, *more]
    run = subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    shown = f"[{host}]" if more else host
    assert run.stdout.readline() == f"http://{shown}:{port}/ · Ctrl-C ends it\n"
    assert listening(port) == [host]
    with urllib.request.urlopen(f"http://{shown}:{port}/") as page:
        assert "llama-lora" in page.read().decode()
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (0, "")
    assert "Traceback" not in err


def listening(port: int) -> list[str]:
    """The addresses on which something listens to that port."""
    loopback = {"0100007F": "127.0.0.1", "0" * 24 + "01000000": "::1"}
    sockets = [
        line.split()[1].split(":")
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    ]
    return [loopback.get(host, host) for host, number in sockets if int(number, 16) == port]


@needs_gradio
def test_port_taken_while_the_model_is_loaded_is_one_line(adapters):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1, port {port}"):
            web.launched(web.build(adapters, GREEDY, None), "127.0.0.1", port)
