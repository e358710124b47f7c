"""The page of the chat in the browser, in real headless Chromium."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from llama_lora.chat import web
from llama_lora.chat.adapters import Adapters, load_adapters
from llama_lora.chat.sampling import Sampling
from llama_lora.model.template import Template
from tests.browser import needs_chromium
from tests.chat.taught import (
    ADAPTER_ANSWERS,
    BASE_ANSWERS,
    GREEDY,
    byte_level,
    config,
    fed,
    said,
    teach,
)
from tests.chat.web_chat import FIRST, SECOND, THIRD, alone, chatting, needs_gradio

HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> ![a](http://127.0.0.1:9/b) &lt;"

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
        chat.wait_for([], side=1)
        chat.choose("right-name", web.NOTHING)
        chat.ask(THIRD)
        chat.wait_for([ADAPTER_ANSWERS[THIRD]])
        chat.ask(" \n")
        chat.choose("right-name", "two")
        chat.wait_for_sides(2)
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


@needs_chromium
@needs_gradio
def test_a_new_chat_amid_an_answer_is_empty(endless_adapters, tmp_path):
    passes = fed(endless_adapters.model)
    with chatting(endless_adapters, ENDLESS, tmp_path / "profile") as chat:
        for _ in range(3):
            chat.ask(FIRST)
            chat.wait(lambda: chat.answers() and len(chat.answers()[-1]) > 40)
            chat.click("new")
            chat.wait(lambda: at_rest(passes))
            assert chat.answers() == []


@needs_chromium
@needs_gradio
def test_another_to_answer_begins_with_nothing(endless_adapters, tmp_path):
    """What the one before was writing is not shown as the other's."""
    passes = fed(endless_adapters.model)
    with chatting(endless_adapters, ENDLESS, tmp_path / "profile") as chat:
        chat.choose("right-name", "base")
        chat.wait_for_sides(2)
        chat.ask(FIRST)
        chat.wait(lambda: all(chat.answers(side) for side in (0, 1)))
        chat.choose("right-name", web.NOTHING)
        chat.wait_for_sides(1)
        chat.choose("right-name", "base")
        chat.wait_for_sides(2)
        chat.wait(lambda: at_rest(passes))
        assert len(chat.answers()) == 1
        assert chat.answers(side=1) == []
