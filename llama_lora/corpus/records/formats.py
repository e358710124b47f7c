"""The formats of conversations, recognized by content: ShareGPT, Alpaca, OpenAI messages."""

from collections import Counter
from typing import Any

from llama_lora.corpus.records.conversation import (
    GPT,
    HUMAN,
    SYSTEM,
    Conversation,
    Rejected,
    check,
    kind,
    show,
)


def read(record: Any) -> tuple[Conversation, Counter, str]:
    """`record` as a checked conversation, its repairs, and the name of its format."""
    if not isinstance(record, dict):
        raise Rejected("not an object", f"found {kind(record)}")
    for name, (is_one, convert) in FORMATS.items():
        if is_one(record):
            return *check(convert(record)), name
    raise Rejected("unknown format", f"its keys are {', '.join(map(show, list(record)[:8]))}")


def from_turns(record: dict, key: str) -> Conversation:
    """A list of turns under `key`, each with `from` and `value`, or `role` and `content`."""
    turns = record[key]
    if isinstance(turns, list):
        turns = [turn_from_message(turn) for turn in turns]
    rest = {name: value for name, value in record.items() if name != key}
    return {**rest, "conversations": turns}


def turn_from_message(turn: Any) -> Any:
    """OpenAI's `{"role", "content"}`, content as text or as a list of text parts."""
    if not isinstance(turn, dict) or "from" in turn or "role" not in turn:
        return turn
    rest = {name: value for name, value in turn.items() if name not in ("role", "content")}
    return {"from": turn["role"], "value": joined(turn.get("content")), **rest}


def joined(content: Any) -> Any:
    """The text of a message; if some parts are not text, the message itself, to be rejected."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "\n\n".join(part["text"] for part in content)
    return content


def from_alpaca(record: dict) -> Conversation:
    """`instruction` and `input` are the question, `output` the answer, `system` the system turn."""
    question, given = record["instruction"], record.get("input")
    if isinstance(question, str) and isinstance(given, str) and given.strip():
        question = f"{question}\n\n{given}"
    turns = [{"from": HUMAN, "value": question}, {"from": GPT, "value": record["output"]}]
    if record.get("system"):
        turns.insert(0, {"from": SYSTEM, "value": record["system"]})
    taken = ("instruction", "input", "output", "system")
    return {**{k: v for k, v in record.items() if k not in taken}, "conversations": turns}


FORMATS = {
    "ShareGPT": (lambda r: "conversations" in r, lambda r: from_turns(r, "conversations")),
    "ShareGPT export": (lambda r: "items" in r, lambda r: from_turns(r, "items")),
    "OpenAI messages": (lambda r: "messages" in r, lambda r: from_turns(r, "messages")),
    "Alpaca": (lambda r: "instruction" in r and "output" in r, from_alpaca),
}
