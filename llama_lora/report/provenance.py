"""How a corpus file was made: the accounts of the stages before it, found along the chain."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llama_lora.cli import InputError
from llama_lora.corpus.records.conversation import GPT
from llama_lora.corpus.records.json_values import dump, parse

EXAMPLES = 3  # of each reason
EXCERPT = 280  # characters of each


@dataclass
class RejectedExample:
    """A rejected conversation: what was wrong with it, and how it begins."""

    id: str
    detail: str
    excerpt: str


@dataclass
class StageRun:
    """A stage that ran: its output, its account, and examples of what it rejected, by reason."""

    out: str
    account: dict[str, Any]
    examples: dict[str, list[RejectedExample]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.account["stage"].removesuffix(".py")

    def reasons(self, counts: str = "rejected") -> list[tuple[str, int]]:
        """The reasons of the account `counts`, the most frequent first."""
        return Counter(self.account[counts]).most_common()


def steps(path: str) -> list[StageRun]:
    """The stages that led to the file at `path`, first to last; none without an account."""
    found: list[StageRun] = []
    visit(path, found, set())
    return found


def visit(path: str, found: list[StageRun], seen: set[str]) -> None:
    """Append to `found` the stage that wrote `path`, after those that wrote its inputs.

    `seen` are the files already visited: a stage may have overwritten its own input.
    """
    account_path = path + ".account"
    if os.path.realpath(path) in seen or not os.path.isfile(account_path):
        return
    seen.add(os.path.realpath(path))
    account = read_account(account_path)
    folder = os.path.dirname(path)
    for source in account["inputs"]:
        visit(os.path.join(folder, source), found, seen)
    rejected = account.get("rejected_file")
    found.append(
        StageRun(path, account, examples(os.path.join(folder, rejected)) if rejected else {})
    )


NUMBERS = "read", "kept", "written", "pairs_read", "pairs_kept", "seconds"
COUNTERS = "rejected", "pairs_rejected", "repairs"


def read_account(path: str) -> dict[str, Any]:
    """The account at `path`, which a stage wrote beside its output."""
    try:
        with open(path, "rb") as file:
            account, _ = parse(file.read())
        sound = (
            isinstance(account["stage"], str)
            and all(isinstance(name, str) for name in account["inputs"])
            and isinstance(account.get("rejected_file") or "", str)
            and all(isinstance(account[name], int | float) for name in NUMBERS)
            and all(isinstance(n, int) for name in COUNTERS for n in account[name].values())
        )
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise InputError(f"{path}: expected the account of a stage, found something else")
    return account


def examples(path: str) -> dict[str, list[RejectedExample]]:
    """The first conversations of a `--rejected` file, by reason."""
    found: dict[str, list[RejectedExample]] = {}
    if not os.path.isfile(path):
        return found
    for item in rejected_items(path):
        those = found.setdefault(str(item.get("reason")), [])
        if len(those) < EXAMPLES:
            those.append(example(item))
    return found


def rejected_items(path: str) -> Iterator[dict]:
    """The items of a `--rejected` file; a stage writes one per line, as an array or bare."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.strip().removesuffix(b",")
            if line in (b"", b"[", b"]", b"[]"):
                continue
            try:
                item, _ = parse(line)
            except ValueError:
                item = None
            if not isinstance(item, dict):
                raise InputError(f"{path}: line {number}: expected an item that --rejected wrote")
            yield item


def example(item: dict) -> RejectedExample:
    """An item of a `--rejected` file, cut to a readable length."""
    conversation = item.get("conversation")
    name, text = "", item.get("text") or conversation
    if isinstance(conversation, dict):
        name, turns = conversation.get("id"), conversation.get("conversations")
        if isinstance(turns, list) and turns:
            text = "\n".join(map(turn_text, turns))
    if not isinstance(text, str):
        text = dump(text).decode()
    where = text.find(detail) if len(detail := str(item.get("detail") or "")) > 3 else -1
    start = max(where - EXCERPT // 2, 0)
    end = start + EXCERPT
    excerpt = ("… " if start else "") + text[start:end] + (" …" if end < len(text) else "")
    return RejectedExample(str(name or ""), detail, excerpt)


def turn_text(turn: Any) -> str:
    """A turn, well-formed or not, as text."""
    if isinstance(turn, dict) and isinstance(turn.get("value"), str):
        return f"{turn.get('from', GPT)}: {turn['value']}"
    return dump(turn).decode()
