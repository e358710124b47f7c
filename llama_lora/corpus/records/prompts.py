"""Files of prompts: what to ask a model, one conversation per record."""

from dataclasses import dataclass, field
from typing import Any

from llama_lora.cli import InputError
from llama_lora.corpus.records import reader
from llama_lora.corpus.records.conversation import (
    GPT,
    HUMAN,
    SYSTEM,
    Rejected,
    Turn,
    check,
    kind,
    show,
)
from llama_lora.corpus.records.formats import from_turns
from llama_lora.corpus.records.ids import Ids
from llama_lora.corpus.records.json_values import parse
from llama_lora.corpus.records.reader import PROMPT_KEYS, Record
from llama_lora.text import sound_text


@dataclass(frozen=True)
class PromptRecord:
    """A conversation to hold: the given turns, then the questions to ask one after the other.

    `about` holds the other keys of its record.
    """

    id: str
    before: list[Turn]
    questions: list[str]
    about: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str, system: str | None = None) -> list[PromptRecord]:
    """The conversations that the file at `path` asks for, with distinct ids.

    Those without a system message get `system`, if it is given.

    A record is a conversation, of a corpus or of OpenAI's messages, whose last turn is a question;
    or FastChat's `{"question_id": …, "turns": ["…", …]}`; or an object with the question under
    "prompt", "question" or "text", and perhaps a "system" message.

    Raises:
        InputError: a record is none of these.
    """
    ids, asked = Ids(), []
    for record in reader.read(path):
        try:
            one = read_record(record)
        except Rejected as rejected:
            reason, detail = rejected.args
            where = f"{path}: record {record.index} (byte {record.offset})"
            raise InputError(f"{where}: {reason}{': ' * bool(detail)}{detail}") from None
        name = ids.distinct(one.id or f"prompt-{record.index}")
        before = one.before
        if system and not (before and before[0]["from"] == SYSTEM):
            before = [{"from": SYSTEM, "value": sound_text(system)}, *before]
        asked.append(PromptRecord(name, before, one.questions, one.about))
    if not asked:
        raise InputError(f"{path}: holds no prompts")
    return asked


def read_record(record: Record) -> PromptRecord:
    """One record; its id is "" if it has none. Raises `Rejected` if it is not a prompt."""
    try:
        value, _ = parse(record.raw)
    except ValueError as error:
        raise Rejected("not JSON", str(error)) from None
    if not isinstance(value, dict):
        raise Rejected("expected an object", f"found {kind(value)}")
    key = next((key for key in ("conversations", "messages", *PROMPT_KEYS) if key in value), None)
    if key is None:
        wanted = ", ".join(("conversations", "messages", *PROMPT_KEYS[:-1]))
        found = f"found the keys {', '.join(map(show, list(value)[:8]))}"
        raise Rejected(f"expected one of the keys {wanted} and {PROMPT_KEYS[-1]}", found)
    about = {name: other for name, other in value.items() if name not in ("id", key)}
    if key in ("conversations", "messages"):
        *before, last = in_turn(check(from_turns(value, key))[0]["conversations"])
        return PromptRecord(given_id(value), before, [last["value"]], about)
    questions = value[key] if key == "turns" else [value[key]]
    if not (isinstance(questions, list) and questions and all_text(questions)):
        wanted = "a list of texts" if key == "turns" else "text"
        raise Rejected(f'expected {wanted} under "{key}"', f"found {kind(value[key])}")
    return PromptRecord(
        given_id(value), head(about), [sound_text(text) for text in questions], about
    )


def in_turn(turns: list[Turn]) -> list[Turn]:
    """`turns`: perhaps a system message, then alternating questions and answers, last a question.

    Raises `Rejected` if they are anything else.
    """
    body = turns[turns[:1] != [] and turns[0]["from"] == SYSTEM :]
    for number, turn in enumerate(body):
        if turn["from"] != (HUMAN, GPT)[number % 2]:
            where = f"turn {len(turns) - len(body) + number} is from {turn['from']}"
            raise Rejected("questions and answers do not alternate", where)
    if len(body) % 2 == 0:
        raise Rejected("expected the last turn to be a question", "found an answer or no turn")
    return turns


def head(about: dict) -> list[Turn]:
    """Take out the system message that a record has under that key, if any."""
    if "system" not in about:
        return []
    if not isinstance(text := about.pop("system"), str):
        raise Rejected('expected text under "system"', f"found {kind(text)}")
    return [{"from": SYSTEM, "value": sound_text(text)}] if text else []


def given_id(value: dict) -> str:
    name = value.get("id", value.get("question_id", ""))
    return sound_text(str(name)) if isinstance(name, str | int) else ""


def all_text(values: list) -> bool:
    return all(isinstance(value, str) for value in values)
