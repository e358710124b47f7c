"""The chat in a terminal and through a pipe: what is typed, and what Ctrl-C ends."""

import io
import json
import os
import pty
import select
import signal
import sys
import time
from functools import partial

import pytest

from llama_lora.chat.answer_file import save_conversation
from llama_lora.chat.console import CONTROLS, Console
from llama_lora.chat.session import Chat
from llama_lora.cli import InputError
from tests.chat.taught import ADAPTER_ANSWERS, BASE_ANSWERS, GREEDY, SCRIPT, SECOND_ANSWERS


class Terminal:
    """The script on a pseudo-terminal."""

    def __init__(self, *args):
        self.screen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore
            os.execv(sys.executable, [sys.executable, str(SCRIPT), *map(str, args)])

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.screen:
            assert time.monotonic() < deadline, self.screen
            if select.select([self.fd], [], [], 1)[0]:
                self.screen += os.read(self.fd, 4096).decode(errors="replace")
        self.screen = self.screen.partition(text)[2]

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def exit_code(self, keys: str) -> int:
        """Type `keys` until the chat ends.

        More than once, because readline shows its prompt a moment before it heeds signals.
        """
        for _ in range(12):
            self.type(keys)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    os.close(self.fd)
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError("the chat did not end")


CTRL_C = "\x03"


def test_ctrl_c_stops_the_answer_then_the_chat(endless):
    terminal = Terminal(
        *("--base_model", endless, "--temperature", 0, "--max_new_tokens", 60_000),
    )
    terminal.wait_for("USER: ")
    terminal.type("Who are you?\n")
    terminal.wait_for("ASSISTANT: ")
    terminal.type(CTRL_C)
    terminal.wait_for("(stopped)")
    terminal.wait_for("USER: ")
    terminal.type("And now?\n")
    terminal.wait_for("ASSISTANT: ")
    terminal.type(CTRL_C)
    terminal.wait_for("USER: ")
    assert terminal.exit_code(CTRL_C) == 0


def test_terminal_chat_remembers_and_ends_at_an_empty_line(base, lora):
    terminal = Terminal("--base_model", base, "--lora_weights", lora, "--temperature", 0)
    for question in ("Who are you?", "What can you do?"):
        terminal.wait_for("USER: ")
        terminal.type(question + "\n")
        terminal.wait_for("ASSISTANT: " + ADAPTER_ANSWERS[question].replace("\n", "\r\n"))
    terminal.wait_for("USER: ")
    terminal.type("a " * 400 + "\n")
    terminal.wait_for("(the prompt has ")
    terminal.wait_for("USER: ")
    assert terminal.exit_code("\n") == 0


FIRST, SECOND, THIRD = BASE_ANSWERS


@pytest.fixture
def typed(adapters, monkeypatch, capsys):
    """Answers to lines that come through a pipe, and what is said beside them."""
    chat = Chat(adapters.model, adapters.first, GREEDY)

    def run(*lines: str) -> tuple[str, list[str]]:
        piped = io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()))
        monkeypatch.setattr(sys, "stdin", piped)
        Console(chat, adapters, partial(save_conversation, mine=set())).run()
        out, err = capsys.readouterr()
        return out, err.splitlines()

    run.chat = chat
    return run


def test_adapters_are_changed_in_the_chat(typed):
    out, said = typed(
        *(FIRST, "/adapter two", "/reset", FIRST, "/adapter base", "/reset", FIRST),
        *("/adapter", "/adapter one", SECOND),
    )
    answers = [answers[FIRST] for answers in (ADAPTER_ANSWERS, SECOND_ANSWERS, BASE_ANSWERS)]
    assert out.startswith("\n".join([*answers, ""]))
    assert [line for line in said if "base" in line] == [
        *("(one [two] base)", "(one two [base])", "(one two [base])", "([one] two base)")
    ]
    assert len(typed.chat.turns) == 4
    with pytest.raises(InputError, match="no adapter is called three; there are one, two, base"):
        typed("/adapter three")


def test_last_question_is_answered_again(typed):
    out, _ = typed(FIRST, "/adapter two", "/regen")
    assert out == f"{ADAPTER_ANSWERS[FIRST]}\n{SECOND_ANSWERS[FIRST]}\n"
    assert len(typed.chat.turns) == 2


def test_conversation_is_saved_as_a_corpus(typed, tmp_path):
    path = tmp_path / "my chat.json"
    _, said = typed("/system Be brief.", FIRST, f"/save {path}", SECOND, f"/save {path}")
    assert said[-1] == f"(saved 2 questions with their answers to {path})"
    [record] = json.loads(path.read_text())
    assert [turn["from"] for turn in record["conversations"]] == [
        *("system", "human", "gpt", "human", "gpt")
    ]


def test_saving_spares_what_is_there(typed, tmp_path):
    path = tmp_path / "corpus.json"
    path.write_text("[]")
    with pytest.raises(InputError, match="already exists; choose another name"):
        typed(FIRST, f"/save {path}")
    assert path.read_text() == "[]"
    with pytest.raises(InputError, match="expected the name of a file"):
        typed("/save")
    with pytest.raises(InputError, match="there is no answer yet"):
        typed("/reset", f"/save {tmp_path / 'new'}")
    assert os.listdir(tmp_path) == ["corpus.json"]


def test_control_characters_are_shown_and_not_obeyed():
    assert "a\x1b[2J\r\n\t\x7f\x9bé".translate(CONTROLS) == "a␛[2J␍\n\t␡\ufffdé"


def test_unknown_command_is_no_question(typed):
    with pytest.raises(InputError, match="/rest: no such command; /help shows them"):
        typed("/rest")
    out, said = typed("/usr/bin is what?", "/help", "/reset")
    assert out.count("\n") == 1
    assert "  /regen          answer the last question again" in said
    assert typed.chat.turns == []
