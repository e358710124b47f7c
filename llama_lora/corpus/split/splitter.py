"""Splitting: every piece fits the window as the trainer renders it, and no answer token is lost.

What fits stays whole. A longer conversation is cut between pairs, and an answer that is longer than
the window continues in further pieces. Each of those repeats, as context, the question and the end
of the text before; its `label_from` is the character of its last answer at which new text begins.
All but the last have `"unfinished": true`: the answer does not end there, so no end is learned.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from llama_lora.cli import InputError
from llama_lora.corpus.records.conversation import (
    GPT,
    HUMAN,
    PIECE_KEYS,
    SYSTEM,
    Conversation,
    Kept,
    Rejected,
    Turn,
    piece_keys_of,
    put_in_order,
)
from llama_lora.corpus.split.token_counter import MeasuredText, Part, TokenCounter
from llama_lora.model.template import Template, load_tokenizer

CONTINUE, TRUNCATE, DROP = ("continue", "truncate", "drop")
# Every piece has room for this many tokens of new answer. With far fewer, an answer would be cut
# into pieces of a few characters, and new text that begins inside a token leaves nothing to learn.
LEAST_ANSWER = 24
GAP = " … "  # replaces the middle of a question
# Where an answer may be cut, the best places first; each cut is before the white space.
BOUNDARIES = [
    re.compile(r"\n[^\S\n]*\n"),
    re.compile(r"(?<=[.!?…:;])(?=\s)|(?<=[。！？；])|\n"),
    re.compile(r"(?=\s)|(?<=[，、])"),
]

# Texts tokenized apart can have other tokens at their ends than when they are joined. So a sum that
# is up to this many tokens over the window may still fit, and is rendered to find out.
SEAM = 8


@dataclass
class Splitter:
    """Splits conversations into pieces of at most `max_length` tokens.

    They are counted with the tokenizer in the folder `model` and the template named `template`.
    `overlong` says what happens to a pair that is longer than the window by itself.
    """

    model: str
    max_length: int
    template: str = "vicuna_v1.1"
    overlong: str = CONTINUE

    def __post_init__(self):
        self.renderer = Template(load_tokenizer(self.model), self.template)
        self.counter = TokenCounter(self.renderer.tokenizer.backend_tokenizer)
        self.gap = self.counter.length(GAP)
        self.least = self.length(PROBE)
        texts = 2 * self.counter.length("a")
        self.frame = self.length(PROBE * 2) - self.least - texts  # what is put around each pair
        self.shared = self.least - texts - self.frame  # what is put before the first
        try:
            self.takes_system = bool(self.renderer.text([{"from": SYSTEM, "value": "a"}, *PROBE]))
        except InputError:  # Gemma's and Mistral's first templates
            self.takes_system = False
        if self.max_length < self.least + 2 * LEAST_ANSWER:
            raise InputError(
                f"--max-length {self.max_length}: expected at least "
                f"{self.least + 2 * LEAST_ANSWER}, since the template alone takes {self.least} "
                f"tokens with the tokenizer of {self.model}"
            )

    def length(self, turns: list[Turn], parts: Iterable[Part] = ()) -> int:
        """How many tokens the turns have when rendered; `parts` of them have been measured."""
        return self.counter.length_with(self.renderer.text(turns), parts)

    # ------------------------------------------------------------------ one conversation

    def __call__(self, conversation: Conversation) -> Kept:
        repairs, dropped = Counter(), Counter()
        turns = put_in_order(conversation["conversations"], repairs)
        keys = piece_keys_of(conversation, turns)
        head = [turn for turn in turns if turn["from"] == SYSTEM]
        if head and not self.takes_system:
            raise Rejected("the template takes no system message")
        head, shared = self.fitting_head(head, repairs)
        body = [turn for turn in turns if turn["from"] != SYSTEM]
        pairs = [self.pair(*body[at : at + 2]) for at in range(0, len(body), 2)]
        pieces: list[tuple[int, dict]] = []
        for first, last, fits in self.runs(head, pairs, shared):
            its_keys = keys if last == len(pairs) else {}
            if fits:
                turns = head + [turn for one in pairs[first:last] for turn in one.turns]
                pieces.append((first, {"conversations": turns, **its_keys}))
            elif self.overlong == DROP:
                dropped["longer than the window"] += 1
            else:
                parts = self.parts(head, pairs[first], shared, its_keys, repairs)
                pieces += [(first, part) for part in parts]
        if not pieces:
            raise Rejected("longer than the window")
        kept = list(named(conversation, pieces))
        return Kept(kept, dropped, repairs, pairs=len(pairs) - dropped.total())

    def pair(self, question: Turn, answer: Turn) -> "Pair":
        return Pair(question, answer, *map(self.measure, (question, answer)))

    def measure(self, turn: Turn) -> MeasuredText:
        return self.counter.measure(turn["value"])

    def runs(
        self, head: list[Turn], pairs: list["Pair"], shared: int
    ) -> Iterator[tuple[int, int, bool]]:
        """Ranges `[first, last)` of pairs for one piece each, and whether they fit in it.

        A pair that does not fit is alone. `shared` is the length of what comes once before them.
        """
        first = 0
        while first < len(pairs):
            last, total = first, shared
            while last < len(pairs):
                more = total + self.frame + pairs[last].size
                if more > self.max_length and last > first:
                    break
                last, total = last + 1, more
            fits = total <= self.max_length // 2
            while not fits and total <= self.max_length + SEAM:
                together = pairs[first:last]
                turns = head + [turn for one in together for turn in one.turns]
                parts = [part for one in together for part in one.parts]
                fits = self.length(turns, parts) <= self.max_length
                if fits or last - first == 1:
                    break
                last, total = last - 1, self.max_length
            yield first, last, fits
            first = last

    def fitting_head(self, head: list[Turn], repairs: Counter) -> tuple[list[Turn], int]:
        """The system turn, without its middle if it takes more than a third of the window.

        Also the length of what the template then puts before the first pair.
        """
        if not head:
            return head, self.shared

        def around(text: str) -> list[Turn]:
            return [{**head[0], "value": text}, *PROBE]

        text = head[0]["value"]
        length = self.length(around(text))
        if length > (room := max(self.max_length // 3, self.least)):
            repairs["system turns shortened"] += 1
            text, length, _ = self.shortened(self.counter.measure(text), room, self.least, around)
        return [{**head[0], "value": text}], length - self.least + self.shared

    # ------------------------------------------------------------------ one pair that is too long

    def parts(
        self, head: list[Turn], one: "Pair", shared: int, keys: dict, repairs: Counter
    ) -> list[dict]:
        """Pieces that together hold the whole answer, each with as much context as fits."""

        def asked(text: str) -> list[Turn]:
            return [*head, {**one.question, "value": text}, {**one.answer, "value": ""}]

        text = one.answer["value"]
        at = keys.get("label_from", 0)
        frame = shared + self.frame
        shorten = partial(self.shortened, one.asked, frame=frame, around=asked)
        whole = Asked(one.asked.text, frame + len(one.asked), [one.asked.whole])
        first = again = whole
        if whole.length > (room := self.max_length - LEAST_ANSWER):
            repairs["questions shortened"] += 1
            first = shorten(room)
        if whole.length > (room := self.max_length // 3):
            again = shorten(room)
        pieces: list[dict] = []
        while not pieces or at < len(text):
            asking = again if at else first
            context = self.context(one.answered, at) if at else 0
            before = [*head, {**one.question, "value": asking.text}]
            end = self.end(before, asking, one.answered, context, at)
            piece = {"conversations": [*before, {**one.answer, "value": text[context:end]}]}
            if at > context:
                piece["label_from"] = at - context
            if end < len(text) or keys.get("unfinished"):
                piece["unfinished"] = True
            pieces.append(piece)
            at = end
            if self.overlong == TRUNCATE:
                break
        repairs["answers truncated"] += at < len(text)
        repairs["answers continued"] += len(pieces) > 1
        return pieces

    def end(
        self, before: list[Turn], asking: "Asked", measured: MeasuredText, context: int, at: int
    ) -> int:
        """The character up to which the answer fits, if the piece has it from `context` on.

        The turns `before` it end with the question `asking`.
        """
        text = measured.text
        first, new = measured.before(context), measured.before(at)
        room = self.max_length - asking.length - (new - first) - SEAM
        while room > 0:
            limit = measured.place(new + room)
            end = boundary(text, at, limit) if limit < len(text) else len(text)
            answer = {"from": GPT, "value": text[context:end]}
            parts = [*asking.parts, Part(measured, context, end)]
            total = self.length([*before, answer], parts)
            if total <= self.max_length:
                return end
            room -= max(total - self.max_length, 1)
        return min(at + 1, len(text))

    def context(self, measured: MeasuredText, at: int) -> int:
        """Where the repeated end of an answer begins: a quarter of the window before `at`."""
        first = measured.before(at) - self.max_length // 4
        if first <= 0:
            return 0
        start = measured.place(first)
        word = re.compile(r"\s(?=\S)").search(measured.text, start, at)
        return word.end() if word else start

    def shortened(
        self,
        measured: MeasuredText,
        limit: int,
        frame: int,
        around: Callable[[str], list[Turn]],
    ) -> "Asked":
        """A text without its middle, so that the turns `around` it have at most `limit` tokens.

        `frame` is how many they have around an empty text.
        """
        text, count = measured.text, len(measured)
        kept = min(limit - frame - self.gap, count - 1)
        while kept > 1:
            left = text[: measured.place(kept // 2)]
            right = text[measured.place(count - kept // 2) :]
            left, right = left.rpartition(" ")[0] or left, right.partition(" ")[2] or right
            end = len(text)
            parts = [Part(measured, 0, len(left)), Part(measured, end - len(right), end)]
            shorter = left + GAP + right
            length = self.length(around(shorter), parts)
            if length <= limit:
                return Asked(shorter, length, parts)
            kept -= max(length - limit, 1)
        return Asked(GAP, self.length(around(GAP)), [])


@dataclass
class Pair:
    """A question and its answer, and their texts with the places of their tokens."""

    question: Turn
    answer: Turn
    asked: MeasuredText
    answered: MeasuredText

    @property
    def turns(self) -> list[Turn]:
        return [self.question, self.answer]

    @property
    def parts(self) -> list[Part]:
        return [self.asked.whole, self.answered.whole]

    @property
    def size(self) -> int:
        """How many tokens the two texts have."""
        return len(self.asked) + len(self.answered)


class Asked(NamedTuple):
    """A question or system turn, whole or without its middle, and the measured parts of its text.

    `length` is the number of tokens of a piece that has only this and what the template adds.
    """

    text: str
    length: int
    parts: list[Part]


PROBE = [{"from": HUMAN, "value": "a"}, {"from": GPT, "value": "a"}]


def boundary(text: str, at: int, end: int) -> int:
    """The best place to cut `text` in the second half between `at` and `end`; else `end`."""
    for pattern in BOUNDARIES:
        cuts = [match.start() for match in pattern.finditer(text, (at + end) // 2, end)]
        if cuts and cuts[-1] > at:
            return cuts[-1]
    return max(end, at + 1)


def named(conversation: Conversation, pieces: list[tuple[int, dict]]) -> Iterator[Conversation]:
    """Conversations of the pieces: `ID_4` starts with turn 4, `ID_4_1` continues its answer."""
    rest = {name: value for name, value in conversation.items() if name not in PIECE_KEYS}
    parts: Counter = Counter()
    for first, piece in pieces:
        name = f"{conversation['id']}_{2 * first}" + (f"_{parts[first]}" if parts[first] else "")
        parts[first] += 1
        if len(pieces) > 1:
            origin = rest.get("piece_of", conversation["id"])
            yield {**rest, "id": name, "piece_of": origin, **piece}
        else:
            yield {**rest, **piece}
