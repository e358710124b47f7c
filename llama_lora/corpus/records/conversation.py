"""What a conversation is: its schema, the roles' names, and the repairs that lose nothing.

A conversation is `{"id": str, "conversations": [turn, …]}` and a turn is `{"from": role, "value":
str}` with the roles of `ROLES`; other keys of either travel along unchanged. A pair is a question
directly followed by its answer.
"""

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from llama_lora.text import sound_text

HUMAN, GPT, SYSTEM = ROLES = ("human", "gpt", "system")

# The names that datasets and chat exports use for the three roles.
ROLE_NAMES = {
    **dict.fromkeys(("human", "user", "prompter", "question"), HUMAN),
    **dict.fromkeys(
        ("gpt", "assistant", "chatgpt", "gpt4", "gpt-4", "gpt-3.5", "bing", "bard", "model", "ai")
        + ("bot", "claude", "gemini", "palm", "answer"),
        GPT,
    ),
    SYSTEM: SYSTEM,
    "developer": SYSTEM,
}

Turn = dict[str, Any]
Conversation = dict[str, Any]


PIECE_KEYS = "label_from", "unfinished"  # of a conversation that is a piece of an answer


class Rejected(Exception):
    """This conversation cannot be used; the account counts it under `reason`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass
class Kept:
    """What a stage made of one conversation.

    `dropped` counts the pairs that were left out, by reason; `repairs` what was repaired; `seen`
    what the stage reports at the end (such as languages). `pairs` is how many pairs are left in
    `conversations`; a stage that spreads one pair over several sets it itself.
    """

    conversations: list[Conversation]
    dropped: Counter = field(default_factory=Counter)
    repairs: Counter = field(default_factory=Counter)
    seen: Counter = field(default_factory=Counter)
    pairs: int | None = None

    def __post_init__(self):
        if self.pairs is None:
            self.pairs = sum(count_pairs(c["conversations"]) for c in self.conversations)


def count_pairs(turns: list[Turn]) -> int:
    """Questions that are directly followed by an answer."""
    roles = [turn["from"] for turn in turns]
    return list(zip(roles, roles[1:], strict=False)).count((HUMAN, GPT))


def check(conversation: Any) -> tuple[Conversation, Counter]:
    """`conversation` in the schema above, and what had to be repaired.

    An integer id becomes text, a missing one is made from the content (so it stays the same from
    run to run), role names become those of `ROLES`, a null value becomes empty text, a number
    becomes its digits, and lone surrogates become U+FFFD. Raises `Rejected` for the rest.
    """
    if not isinstance(conversation, dict):
        raise Rejected("not an object", f"found {kind(conversation)}")
    turns = conversation.get("conversations")
    if not isinstance(turns, list):
        raise Rejected("no list of turns", f'"conversations" is {kind(turns)}')
    repairs: Counter = Counter()
    turns = [check_turn(turn, number, repairs) for number, turn in enumerate(turns)]
    name = check_id(conversation.get("id"), turns, repairs)
    return {**conversation, "id": name, "conversations": turns}, repairs


def check_turn(turn: Any, number: int, repairs: Counter) -> Turn:
    """One turn in the schema; repairs are counted in `repairs`."""
    if not isinstance(turn, dict):
        raise Rejected("a turn is not an object", f"turn {number} is {kind(turn)}")
    role = turn.get("from")
    known = ROLE_NAMES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise Rejected("unknown role", f"turn {number} is from {show(role)}")
    value = turn.get("value")
    if value is None:
        repairs["null values"] += 1
        text = ""
    elif isinstance(value, str):
        text = sound_text(value)
        repairs["lone surrogates"] += text != value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        repairs["numbers as values"] += 1
        text = str(value)
    else:
        raise Rejected("a value is not text", f"turn {number} holds {kind(value)}")
    repairs["role names"] += known != role
    return {**turn, "from": known, "value": text}


def check_id(name: Any, turns: list[Turn], repairs: Counter) -> str:
    """The id as text; if there is none, one made from the turns."""
    if isinstance(name, str) and name.strip():
        sound = sound_text(name)
        repairs["lone surrogates"] += sound != name
        return sound
    if isinstance(name, int) and not isinstance(name, bool):
        repairs["integer ids"] += 1
        return str(name)
    repairs["missing ids"] += 1
    return "id-" + digest(turns).hex()[:12]


def put_in_order(turns: list[Turn], repairs: Counter) -> list[Turn]:
    """A system turn if there is one, then alternating questions and answers.

    Answers before the first question and questions after the last answer belong to no pair; they
    are dropped and counted. Raises `Rejected` if roles do not alternate in between, or if no pair
    is left.
    """
    head = turns[:1] if turns and turns[0]["from"] == SYSTEM else []
    body = turns[len(head) :]
    first = next((i for i, turn in enumerate(body) if turn["from"] != GPT), len(body))
    last = next((i for i in range(len(body), first, -1) if body[i - 1]["from"] != HUMAN), first)
    middle = body[first:last]
    if not middle:
        raise Rejected("no question with an answer" if body else "empty")
    for number, turn in enumerate(middle):
        if turn["from"] != (HUMAN, GPT)[number % 2]:
            where = f"turn {len(head) + first + number} is from {turn['from']}"
            raise Rejected("roles do not alternate", where)
    repairs["leading answers"] += first > 0
    repairs["trailing questions"] += last < len(body)
    return head + middle


def piece_keys_of(conversation: Conversation, turns: list[Turn]) -> dict:
    """What splitting has noted about the last answer; raises `Rejected` if that is impossible."""
    label_from, length = conversation.get("label_from", 0), len(turns[-1]["value"])
    if not isinstance(label_from, int) or not 0 <= label_from <= length:
        found = label_from if kind(label_from) == "a number" else kind(label_from)
        detail = f"it is {found}, and the answer has {length} characters"
        raise Rejected("label_from is outside the answer", detail)
    return {name: conversation[name] for name in PIECE_KEYS if name in conversation}


def digest(turns: list[Turn]) -> bytes:
    """16 bytes, equal for conversations that differ at most in white space."""
    return prefix_digests(turns)[-1]


def prefix_digests(turns: list[Turn]) -> list[bytes]:
    """The `digest` of the first turn, of the first two, …; of an empty list if there is none."""
    running, digests = blake2b(digest_size=16), []
    if not turns:
        return [running.digest()]
    for turn in turns:
        text = " ".join(turn["value"].split())
        running.update(f"{turn['from']}\0{len(text)}\0{text}".encode())
        digests.append(running.copy().digest())
    return digests


def kind(value: Any) -> str:
    """The type of `value` in JSON's words."""
    names = {dict: "an object", list: "an array", str: "text", bool: "a boolean"}
    if value is None:
        return "missing or null"
    return names.get(type(value), "a number")


def show(value: Any) -> str:
    """`value` as shown in a message, cut to a readable length."""
    text = sound_text(value) if isinstance(value, str) else kind(value)
    return repr(text if len(text) <= 40 else text[:40] + "…")
