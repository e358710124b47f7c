"""What the tests of the chat in the browser share: the page, and what one does with it."""

import importlib.util
import json
import socket
import time
from contextlib import contextmanager

import pytest

from llama_lora.chat import web
from llama_lora.chat.sampling import generator
from tests.browser import opened
from tests.chat.taught import BASE_ANSWERS, GREEDY

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None,
    reason="gradio is not installed: pip install -r requirements-web.txt",
)
FIRST, SECOND, THIRD = BASE_ANSWERS


def alone(adapters, name: str, turns: list[dict]) -> str:
    """The answer that these turns get in a chat."""
    decoder = adapters.decoder(name)
    prompt = decoder.prompter.ids(turns)
    return "".join(decoder.stream(prompt, GREEDY, generator(adapters.model, 0)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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

    def wait_for_sides(self, number: int) -> None:
        """Until so many conversations are shown."""
        self.wait(
            lambda: self.page.run(f"document.querySelectorAll('[role=log]').length == {number}")
        )

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
