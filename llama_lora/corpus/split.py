"""Splitting: every piece fits the window as the trainer renders it, and no answer token is lost.

What fits stays whole. A longer conversation is cut between pairs, and an answer that is longer than
the window goes on in further pieces. Each of those repeats the question and the end of what came
before as context; its `label_from` is the character of its last answer where new text begins. All
but the last have `"unfinished": true`: the answer does not end there, so no end is to be learned.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding

from llama_lora.cli import InputError
from llama_lora.corpus.conversation import (
    GPT,
    HUMAN,
    MARKS,
    SYSTEM,
    Conversation,
    Kept,
    Rejected,
    Turn,
    marks_of,
    put_in_order,
)
from llama_lora.model.template import Template, load_tokenizer

CONTINUE, TRUNCATE, DROP = OVERLONG = ("continue", "truncate", "drop")
LEAST_ANSWER = 16  # tokens of new answer for which every piece has room
GAP = " … "  # in the place of the middle of a question
# Where an answer may be cut, the best places first; all lie before the white space.
BOUNDARIES = [
    re.compile(r"\n[^\S\n]*\n"),
    re.compile(r"(?<=[.!?…:;])(?=\s)|(?<=[。！？；])|\n"),
    re.compile(r"(?=\s)|(?<=[，、])"),
]

# Texts that are tokenized apart can have other tokens at their ends than where they meet. What by
# such reckoning comes this many tokens over the window may yet fit, and is rendered to see.
SEAM = 8

# A step of splitting asks by `yield` for the tokens of texts, and for the lengths of lists of turns
# as they are rendered; several at a time. It is sent the replies, and returns a result.
Step = Generator[list[str | list[Turn]], list, Any]


@dataclass
class Splitter:
    """Splits conversations to at most `max_length` tokens.

    They are counted with the tokenizer in the folder `model` and the template named `template`.
    `overlong` says what becomes of a pair that is longer than the window by itself.
    """

    model: str
    max_length: int
    template: str = "vicuna_v1.1"
    overlong: str = CONTINUE

    def __post_init__(self):
        self.renderer = Template(load_tokenizer(self.model), self.template)
        self.tokenizer = self.renderer.tokenizer.backend_tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.least, twice = self.lengths([PROBE, PROBE * 2])
        texts = 2 * len(self.tokenizer.encode("a", add_special_tokens=False))
        self.frame = twice - self.least - texts  # what the template puts around each pair
        self.shared = self.least - texts - self.frame  # what it puts before the first
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

    def __call__(self, conversation: Conversation) -> Kept:
        (outcome,) = self.many([conversation])
        if isinstance(outcome, Rejected):
            raise outcome
        return outcome

    def many(self, conversations: list[Conversation]) -> list[Kept | Rejected]:
        """The outcome for each. All advance step by step together, so that texts are tokenized in
        batches, which runs on all cores."""
        steps = {number: self.split(one) for number, one in enumerate(conversations)}
        replies: dict[int, list | None] = dict.fromkeys(steps)
        outcomes: dict[int, Kept | Rejected] = {}
        while replies:
            asked = {}
            for number, reply in replies.items():
                try:
                    asked[number] = steps[number].send(reply)
                except StopIteration as end:
                    outcomes[number] = end.value
                except Rejected as rejected:
                    outcomes[number] = rejected
            every = [one for questions in asked.values() for one in questions]
            lengths = iter(self.lengths([one for one in every if isinstance(one, list)]))
            texts = [one for one in every if isinstance(one, str)]
            tokens = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
            replies = {
                number: [next(tokens if isinstance(one, str) else lengths) for one in questions]
                for number, questions in asked.items()
            }
        return [outcomes[number] for number in steps]

    def lengths(self, batch: list[list[Turn]]) -> list[int]:
        """How many tokens each list of turns has when it is rendered."""
        texts = [self.renderer.text(turns) for turns in batch]
        tokens = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(one) for one in tokens]

    # ------------------------------------------------------------------ one conversation

    def split(self, conversation: Conversation) -> Step:
        """`Kept`, or raises `Rejected`."""
        repairs, dropped = Counter(), Counter()
        turns = put_in_order(conversation["conversations"], repairs)
        marks = marks_of(conversation, turns)
        head = [turn for turn in turns if turn["from"] == SYSTEM]
        if head and not self.takes_system:
            raise Rejected("the template takes no system turn")
        head, shared = yield from self.fitting_head(head, repairs)
        body = [turn for turn in turns if turn["from"] != SYSTEM]
        tokens = yield [turn["value"] for turn in body]
        pairs = [Pair(*body[at : at + 2], *tokens[at : at + 2]) for at in range(0, len(body), 2)]
        runs = yield from self.runs(head, pairs, shared)
        pieces: list[tuple[int, dict]] = []
        for first, last, fits in runs:
            its_marks = marks if last == len(pairs) else {}
            if fits:
                turns = head + [turn for one in pairs[first:last] for turn in one.turns]
                pieces.append((first, {"conversations": turns, **its_marks}))
            elif self.overlong == DROP:
                dropped["longer than the window"] += 1
            else:
                parts = yield from self.parts(head, pairs[first], shared, its_marks, repairs)
                pieces += [(first, part) for part in parts]
        if not pieces:
            raise Rejected("longer than the window")
        kept = list(named(conversation, pieces))
        return Kept(kept, dropped, repairs, pairs=len(pairs) - dropped.total())

    def runs(self, head: list[Turn], pairs: list["Pair"], shared: int) -> Step:
        """Ranges `[first, last)` of pairs that go together, and whether they fit: a pair that does
        not stands alone. `shared` is the length of what stands once before them."""
        runs, first = [], 0
        while first < len(pairs):
            last, total = first, shared
            while last < len(pairs):
                more = total + self.frame + pairs[last].size
                if more > self.max_length and last > first:
                    break
                last, total = last + 1, more
            fits = total <= self.max_length // 2
            while not fits and total <= self.max_length + SEAM:
                (total,) = yield [head + [turn for one in pairs[first:last] for turn in one.turns]]
                fits = total <= self.max_length
                if fits or last - first == 1:
                    break
                last, total = last - 1, self.max_length
            runs.append((first, last, fits))
            first = last
        return runs

    def fitting_head(self, head: list[Turn], repairs: Counter) -> Step:
        """The system turn, without its middle if it takes more than a third of the window, and the
        length of what it makes the template put before the first pair."""
        if not head:
            return head, self.shared

        def around(text: str) -> list[Turn]:
            return [{**head[0], "value": text}, *PROBE]

        text = head[0]["value"]
        tokens, length = yield [text, around(text)]
        if length > (room := max(self.max_length // 3, self.least)):
            repairs["system turns shortened"] += 1
            text, length = yield from self.shortened(text, tokens, room, self.least, around)
        return [{**head[0], "value": text}], length - self.least + self.shared

    # ------------------------------------------------------------------ one pair that is too long

    def parts(
        self, head: list[Turn], one: "Pair", shared: int, marks: dict, repairs: Counter
    ) -> Step:
        """Pieces that together hold the whole answer, each after as much context as fits."""

        def asked(text: str) -> list[Turn]:
            return [*head, {**one.question, "value": text}, {**one.answer, "value": ""}]

        whole, text = one.question["value"], one.answer["value"]
        at = marks.get("label_from", 0)
        tokens, frame = one.question_tokens, shared + self.frame
        first = again = whole, frame + len(tokens)
        if first[1] > (room := self.max_length - LEAST_ANSWER):
            repairs["questions shortened"] += 1
            first = yield from self.shortened(whole, tokens, room, frame, asked)
        if again[1] > (room := self.max_length // 3):
            again = yield from self.shortened(whole, tokens, room, frame, asked)
        starts = [start for start, _ in one.answer_tokens.offsets]
        pieces: list[dict] = []
        while not pieces or at < len(text):
            asking, length = again if at else first
            context = self.context(text, starts, at) if at else 0
            before = [*head, {**one.question, "value": asking}]
            end = yield from self.end(before, length, one.answer, starts, context, at)
            piece = {"conversations": [*before, {**one.answer, "value": text[context:end]}]}
            if at > context:
                piece["label_from"] = at - context
            if end < len(text) or marks.get("unfinished"):
                piece["unfinished"] = True
            pieces.append(piece)
            at = end
            if self.overlong == TRUNCATE:
                break
        repairs["answers truncated"] += at < len(text)
        repairs["answers continued"] += len(pieces) > 1
        return pieces

    def end(
        self,
        before: list[Turn],
        length: int,
        answer: Turn,
        starts: list[int],
        context: int,
        at: int,
    ) -> Step:
        """The character up to which the answer fits, if it is given from `context` on.

        `length` is that of a piece with what is `before` it and an empty answer.
        """
        text = answer["value"]
        first, new = bisect_left(starts, context), bisect_left(starts, at)
        room = self.max_length - length - (new - first) - SEAM
        while room > 0:
            limit = new + room
            end = boundary(text, at, starts[limit]) if limit < len(starts) else len(text)
            (total,) = yield [[*before, {**answer, "value": text[context:end]}]]
            if total <= self.max_length:
                return end
            room -= max(total - self.max_length, 1)
        return min(at + 1, len(text))

    def context(self, text: str, starts: list[int], at: int) -> int:
        """Where the repeated end of an answer begins: a quarter of the window before `at`."""
        first = bisect_left(starts, at) - self.max_length // 4
        if first <= 0:
            return 0
        word = re.compile(r"\s(?=\S)").search(text, starts[first], at)
        return word.end() if word else starts[first]

    def shortened(
        self,
        text: str,
        tokens: Encoding,
        limit: int,
        frame: int,
        around: Callable[[str], list[Turn]],
    ) -> Step:
        """`text` without its middle, so that what `around` makes of it has at most `limit` tokens,
        and how many it has; `frame` is how many it makes of nothing."""
        starts = [start for start, _ in tokens.offsets]
        kept = min(limit - frame - len(GAP), len(starts) - 1)
        while kept > 1:
            left = text[: starts[kept // 2]]
            right = text[starts[len(starts) - kept // 2] :]
            shorter = (left.rpartition(" ")[0] or left) + GAP + (right.partition(" ")[2] or right)
            (length,) = yield [around(shorter)]
            if length <= limit:
                return shorter, length
            kept -= max(length - limit, 1)
        return GAP, frame + len(GAP)


@dataclass
class Pair:
    """A question and its answer, and their tokens."""

    question: Turn
    answer: Turn
    question_tokens: Encoding
    answer_tokens: Encoding

    @property
    def turns(self) -> list[Turn]:
        return [self.question, self.answer]

    @property
    def size(self) -> int:
        """How many tokens the two texts have."""
        return len(self.question_tokens) + len(self.answer_tokens)


PROBE = [{"from": HUMAN, "value": "a"}, {"from": GPT, "value": "a"}]


def boundary(text: str, at: int, end: int) -> int:
    """The best place to cut `text` in the second half between `at` and `end`; else `end`."""
    for pattern in BOUNDARIES:
        cuts = [match.start() for match in pattern.finditer(text, (at + end) // 2, end)]
        if cuts and cuts[-1] > at:
            return cuts[-1]
    return max(end, at + 1)


def named(conversation: Conversation, pieces: list[tuple[int, dict]]) -> Iterator[Conversation]:
    """Conversations of the pieces: `ID_4` starts with turn 4, `ID_4_1` goes on with its answer."""
    rest = {name: value for name, value in conversation.items() if name not in MARKS}
    parts: Counter = Counter()
    for first, piece in pieces:
        name = f"{conversation['id']}_{2 * first}" + (f"_{parts[first]}" if parts[first] else "")
        parts[first] += 1
        if len(pieces) > 1:
            origin = rest.get("piece_of", conversation["id"])
            yield {**rest, "id": name, "piece_of": origin, **piece}
        else:
            yield {**rest, **piece}
