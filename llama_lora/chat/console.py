"""A chat in the terminal or through a pipe: questions in on stdin, answers out on stdout."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator

from llama_lora.chat.out_of_memory import OutOfMemory
from llama_lora.cli import InputError

COMMANDS = """commands in a chat:
  /reset          forget the conversation
  /system TEXT    change the system message; without TEXT, use the template's own
  /regen          answer the last question again
  /adapter NAME   switch to that adapter, or to the base alone; without NAME, list them
  /save FILE      save the conversation as a corpus file
  /help           show this

Through a pipe, every line is a question or a command. If memory runs out for an answer, the next
line follows, and the exit code is 1. In a terminal, an empty line ends the chat. Ctrl-C stops an
answer or, at the prompt, ends the chat."""

# Control characters, which could steer the terminal, are shown as visible stand-ins.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
CONTROLS |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


class Console:
    """A chat that is read from stdin."""

    def __init__(self, chat, adapters, save: Callable[[dict, str], None]):
        """`adapters` are those `chat` can switch to; `save` writes a conversation to a path."""
        self._chat, self._adapters, self._save = chat, adapters, save
        self._adapter = adapters.names[0]
        self._terminal = sys.stdin.isatty()
        self._label = "ASSISTANT: " if self._terminal and sys.stdout.isatty() else ""
        self._commands = {
            "/reset": self._reset,
            "/system": self._system,
            "/regen": self._regenerate,
            "/adapter": self._change_adapter,
            "/save": self._save_conversation,
            "/help": self._help,
        }

    def run(self) -> None:
        """Answer line after line.

        An answer that memory runs out for does not end the chat, nor does, in a terminal, one that
        is stopped or fails otherwise.

        Raises:
            InputError: through a pipe: what failed; or at the end, that memory ran out.
        """
        sys.stdin.reconfigure(errors="replace")
        cut_short = 0
        for line in _read_lines(self._terminal):
            try:
                self._obey(line)
            except OutOfMemory as error:
                tell(error.told("/reset"))
                cut_short += 1
            except (InputError, KeyboardInterrupt) as error:
                if not self._terminal:
                    raise
                tell(str(error) or "stopped")
        if cut_short and not self._terminal:
            raise InputError(f"answers cut short because memory ran out: {cut_short:,}")

    def _obey(self, line: str) -> None:
        command, _, text = line.partition(" ")
        if command in self._commands:
            self._commands[command](text.strip())
        elif re.fullmatch("/[a-z]+", command):
            raise InputError(f"{command}: no such command; /help shows them")
        else:
            show(self._chat, self._chat.stream(line), self._label)

    def _reset(self, _: str) -> None:
        self._chat.reset()
        tell("the conversation is forgotten")

    def _system(self, text: str) -> None:
        self._chat.system = text or None
        tell("the system message is " + (repr(text) if text else "the template's own"))

    def _regenerate(self, _: str) -> None:
        show(self._chat, self._chat.regenerate(), self._label)

    def _change_adapter(self, name: str) -> None:
        if name:
            self._chat.decoder = self._adapters.decoder(name)
            self._adapter = name
        tell(" ".join(f"[{n}]" if n == self._adapter else n for n in self._adapters.names))

    def _save_conversation(self, path: str) -> None:
        if not path:
            raise InputError("/save: expected the name of a file")
        if not self._chat.turns:
            raise InputError("/save: there is no answer yet")
        self._save(self._chat.conversation(), path)
        tell(f"saved {len(self._chat.turns) // 2} questions with their answers to {path}")

    def _help(self, _: str) -> None:
        print(COMMANDS, file=sys.stderr)


def show(chat, pieces: Iterator[str], label: str = "") -> None:
    """Print an answer of `chat` as it comes, then a newline."""
    begun = False
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                shown = piece.translate(CONTROLS) if sys.stdout.isatty() else piece
                print(label + shown, end="", flush=True)
                label, begun = "", True
    except (KeyboardInterrupt, InputError) as error:
        if begun or isinstance(error, KeyboardInterrupt):
            print(flush=True)
        raise
    print(flush=True)
    if not chat.stopped:
        tell("cut off: --max_new_tokens or the model's window is used up")


def tell(message: str) -> None:
    """Print something that is not an answer."""
    print(f"({message})", file=sys.stderr)


def _read_lines(terminal: bool) -> Iterator[str]:
    """The lines that are not blank; in a terminal a blank line or Ctrl-C ends them too."""
    if terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (gives input() its editing and history)
    while True:
        try:
            line = input("USER: " if terminal and sys.stdout.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            if terminal:
                print(file=sys.stderr)
            return
        if line:
            yield line
        elif terminal:
            return
