"""The chat in the browser, in real headless Chromium, and what it does with nobody there."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from browser import needs_chromium, opened
from taught import (
    ADAPTER_ANSWERS,
    BASE_ANSWERS,
    GREEDY,
    SCRIPT,
    WINDOW,
    byte_level,
    config,
    fed,
    generate,
    said,
    teach,
)
from transformers import LlamaForCausalLM

from llama_lora.chat import web
from llama_lora.chat.adapters import Adapters, load_adapters
from llama_lora.chat.sampling import Sampling, generator
from llama_lora.cli import InputError
from llama_lora.model.template import Template

pytest_plugins = ["taught_models"]

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None,
    reason="gradio is not installed: pip install -r requirements-web.txt",
)
FIRST, SECOND, THIRD = BASE_ANSWERS
HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> ![a](http://127.0.0.1:9/b) &lt;"


# The answers, without a page

DEFAULTS = ("", 0, 1, 0, 1, 80)  # system message and sliders


def last(updates) -> tuple:
    """The last of what a question yields: both conversations as text, and the notes."""
    *_, (_, _, left, right, notes) = updates
    return [turn["value"] for turn in left], [turn["value"] for turn in right], notes


@pytest.fixture
def answering(adapters) -> web.Answering:
    return web.Answering(adapters, GREEDY)


def alone(adapters, name: str, turns: list[dict]) -> str:
    """The answer that these turns get in a chat."""
    decoder = adapters.decoder(name)
    prompt = decoder.prompter.ids(turns)
    return "".join(decoder.stream(prompt, GREEDY, generator(adapters.model, 0)))


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
        return last(answering.ask(FIRST, "one", web.NOTHING, [], [], *settings))[0][1]

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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


# The page


class Chatting:
    """A page with the chat, and what one does with it."""

    def __init__(self, page):
        self.page = page

    def answers(self, side: int = 0) -> list[str]:
        """The texts of the assistant on the left, or on the right."""
        return json.loads(
            self.page.run(
                "JSON.stringify([...document.querySelectorAll('[role=log]')].map("
                "log => [...log.querySelectorAll('.bot .message-content')].map(m => m.innerText)))"
            )
        )[side]

    def wait(self, condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.page.run("document.body.innerText")
            time.sleep(0.05)

    def wait_for(self, answers: list[str], side: int = 0) -> None:
        """Until the assistant's texts are these."""
        self.wait(lambda: self.answers(side) == answers)

    def type(self, question: str) -> None:
        self.page.run("document.querySelector('#question textarea').focus()")
        self.page.call("Input.insertText", text=question)

    def click(self, button: str) -> None:
        self.page.run(f"document.querySelector('#{button}').click()")

    def ask(self, question: str) -> None:
        self.type(question)
        self.click("send")

    def choose(self, dropdown: str, option: str) -> None:
        self.page.run(f"document.querySelector('#{dropdown} input').focus()")
        found = f"[...document.querySelectorAll('#{dropdown} [role=option]')]"
        found += f".find(o => o.innerText.trim().replace('✓', '').trim() == {json.dumps(option)})"
        self.wait(lambda: self.page.run(f"!!{found}"))
        self.page.run(f"{found}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true}}))")


@contextmanager
def chatting(adapters, sampling, profile):
    port = free_port()
    served = web.launched(web.build(adapters, sampling, None), "127.0.0.1", port)
    try:
        with opened(f"http://127.0.0.1:{port}/", profile) as page:
            chat = Chatting(page)
            for part in ("#question textarea", "#new"):
                chat.wait(lambda part=part: page.run(f"!!document.querySelector('{part}')"))
            yield chat
            outside = [
                url
                for url in page.requests
                if not url.startswith((served.local_url, "data:", "blob:"))
            ]
            assert outside == []
    finally:
        served.close(verbose=False)


CONNECTED: list[str] = []  # hosts that this process has connected to, once it is watched


@pytest.fixture(scope="module")
def watched():
    sys.addaudithook(
        lambda event, args: (
            CONNECTED.append(str(args[1][0]))
            if event == "socket.connect" and isinstance(args[1], tuple)
            else None
        )
    )
    return CONNECTED


@needs_chromium
@needs_gradio
def test_chat_in_the_browser(adapters, tmp_path, watched):
    with chatting(adapters, GREEDY, tmp_path / "profile") as chat:
        chat.ask(FIRST)
        chat.wait_for([ADAPTER_ANSWERS[FIRST]])
        chat.wait_for([BASE_ANSWERS[FIRST]], side=1)
        left = [said("human", FIRST), said("gpt", ADAPTER_ANSWERS[FIRST]), said("human", SECOND)]
        two = alone(adapters, "two", left)
        chat.choose("left-name", "two")
        chat.ask(SECOND)
        chat.wait_for([ADAPTER_ANSWERS[FIRST], two])
        chat.wait_for([BASE_ANSWERS[FIRST], BASE_ANSWERS[SECOND]], side=1)
        chat.choose("left-name", "one")
        chat.click("retry")
        chat.wait_for([ADAPTER_ANSWERS[FIRST], ADAPTER_ANSWERS[SECOND]])
        if folder := os.environ.get("SCREENSHOTS"):
            chat.page.screenshot(Path(folder) / "web.png", 1200, 900)
            chat.page.screenshot(Path(folder) / "web-dark-narrow.png", 420, 900, dark=True)
        chat.click("new")
        chat.wait_for([])
        chat.choose("right-name", web.NOTHING)
        chat.ask(THIRD)
        chat.wait_for([ADAPTER_ANSWERS[THIRD]])
        chat.ask(" \n")
        chat.choose("right-name", "two")
        chat.wait(lambda: chat.page.run("document.querySelectorAll('[role=log]').length == 2"))
        assert chat.answers() == [ADAPTER_ANSWERS[THIRD]]
        assert not [text for text in chat.page.complaints if "dialog" in text]
    assert set(watched) <= {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(scope="module")
def hostile() -> Adapters:
    torch.manual_seed(0)
    template = Template(byte_level())
    model = LlamaForCausalLM(config(max_position_embeddings=512))
    teach(model, template, {FIRST: HOSTILE, SECOND: HOSTILE, THIRD: HOSTILE}, 1e-2)
    return Adapters(model, {"base": template})


@needs_chromium
@needs_gradio
def test_what_a_model_writes_is_text(hostile, tmp_path):
    sampling = Sampling(temperature=0, max_new_tokens=120)
    with chatting(hostile, sampling, tmp_path / "profile") as chat:
        chat.ask(FIRST)
        chat.wait_for([HOSTILE])
        chat.ask(HOSTILE)
        chat.wait(lambda: len(chat.answers()) == 2)
        inside = "document.querySelectorAll('.message script, .message img').length"
        assert chat.page.run(inside) == 0
        assert not [text for text in chat.page.complaints if "dialog" in text]
        asked = "[...document.querySelectorAll('.user .message-content')].map(m => m.innerText)"
        assert chat.page.run(f"{asked}[1]") == HOSTILE


@pytest.fixture
def endless_adapters(endless) -> Adapters:
    return load_adapters(endless, {})[0]


def at_rest(passes: list) -> bool:
    before = len(passes)
    time.sleep(1)
    return len(passes) == before


ENDLESS = Sampling(temperature=0, max_new_tokens=60_000)


@needs_chromium
@needs_gradio
def test_stop_ends_the_answer_and_keeps_it(endless_adapters, tmp_path):
    passes = fed(endless_adapters.model)
    with chatting(endless_adapters, ENDLESS, tmp_path / "profile") as chat:
        for number in (1, 2):
            chat.ask(FIRST)
            chat.wait(lambda n=number: len(chat.answers()) == n and len(chat.answers()[-1]) > 40)
            assert not at_rest(passes)
            chat.click("stop")
            chat.wait(lambda: at_rest(passes))
            assert len(chat.answers()[-1]) > 40


@needs_chromium
@needs_gradio
def test_nobody_is_answered_who_has_gone(endless_adapters, tmp_path):
    passes = fed(endless_adapters.model)
    with chatting(endless_adapters, ENDLESS, tmp_path / "profile") as chat:
        chat.ask(FIRST)
        chat.wait(lambda: len(passes) > 30)
        chat.page.call("Page.navigate", url="about:blank")
        chat.wait(lambda: at_rest(passes))
