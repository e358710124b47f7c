"""A chat in the terminal or through a pipe: questions in on stdin, answers out on stdout."""

import contextlib
import sys
from collections.abc import Iterator

from llama_lora.cli import InputError

COMMANDS = (
    "/reset forgets the conversation, /system TEXT changes the system message; an empty line, the "
    "end of the input or Ctrl-C ends the chat. Of a pipe, every line is a question."
)


def converse(chat) -> None:
    """Answer line after line; in a terminal, an answer that fails or is stopped ends alone."""
    sys.stdin.reconfigure(errors="replace")
    terminal = sys.stdin.isatty()
    for line in _read_lines(terminal):
        command, _, text = line.partition(" ")
        if command == "/reset":
            chat.reset()
        elif command == "/system":
            chat.system = text.strip() or None
        else:
            try:
                answer(chat, line, "ASSISTANT: " if terminal and sys.stdout.isatty() else "")
            except (InputError, KeyboardInterrupt) as error:
                if not terminal:
                    raise
                print(f"({str(error) or 'stopped'})", file=sys.stderr)


def answer(chat, question: str, label: str = "") -> None:
    """Print the answer as it comes, and a newline."""
    try:
        with contextlib.closing(chat.stream(question)) as pieces:
            for piece in pieces:
                print(label + piece, end="", flush=True)
                label = ""
    except KeyboardInterrupt:
        print()
        raise
    print(flush=True)
    if not chat.stopped:
        print("(cut off: --max_new_tokens or the model's window is used up)", file=sys.stderr)


def _read_lines(terminal: bool) -> Iterator[str]:
    """Lines that are not blank; in a terminal a blank one or Ctrl-C ends them as well."""
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
