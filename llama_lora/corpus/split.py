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

from llama_lora.cli import InputError
from llama_lora.corpus.conversation import (
    GPT,
    HUMAN,
    SYSTEM,
    Conversation,
    Kept,
    Rejected,
    Turn,
    kind,
    put_in_order,
)
from llama_lora.model.template import ROLES, Template, load_tokenizer

CONTINUE, TRUNCATE, DROP = OVERLONG = ("continue", "truncate", "drop")
LEAST_ANSWER = 16  # tokens of new answer for which every piece has room
MARKS = ("label_from", "unfinished")
GAP = " … "  # in the place of the middle of a question
# Where an answer may be cut, the best places first; all lie before the white space.
BOUNDARIES = [
    re.compile(r"\n[^\S\n]*\n"),
    re.compile(r"(?<=[.!?…:;])(?=\s)|(?<=[。！？；])|\n"),
    re.compile(r"(?=\s)|(?<=[，、])"),
]

# Where two pairs meet, or a text is cut at white space, tokens can differ from those of the parts
# alone: by one or two, never by this many. What comes closer to the window is tokenized once more.
SEAM = 8

# A step of splitting asks by `yield`: for a list of turns how many tokens it has, for a text where
# its tokens start; several at a time. It is sent the replies, and returns a result.
Step = Generator[list[list[Turn] | str], list, Any]


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
        self.empty, twice = self.lengths([pair("", ""), pair("", "") * 2])
        self.frame = twice - self.empty  # what the template puts around each pair
        if self.max_length < self.empty + 2 * LEAST_ANSWER:
            raise InputError(
                f"--max-length {self.max_length}: expected at least "
                f"{self.empty + 2 * LEAST_ANSWER}, since the template alone takes {self.empty} "
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
            starts = iter(self.starts([one for one in every if isinstance(one, str)]))
            replies = {
                number: [next(starts if isinstance(one, str) else lengths) for one in questions]
                for number, questions in asked.items()
            }
        return [outcomes[number] for number in steps]

    def lengths(self, batch: list[list[Turn]]) -> list[int]:
        """How many tokens each list of turns has when it is rendered."""
        texts = [
            self.renderer.tokenizer.apply_chat_template(
                [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns],
                chat_template=self.renderer.jinja,
                tokenize=False,
            )
            for turns in batch
        ]
        tokens = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(one) for one in tokens]

    def starts(self, texts: list[str]) -> list[list[int]]:
        """The characters at which the tokens of each text start."""
        tokens = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [[start for start, _ in one.offsets] for one in tokens]

    # ------------------------------------------------------------------ one conversation

    def split(self, conversation: Conversation) -> Step:
        """`Kept`, or raises `Rejected`."""
        repairs, dropped = Counter(), Counter()
        turns = put_in_order(conversation["conversations"], repairs)
        marks = marks_of(conversation, turns)
        head = [turn for turn in turns if turn["from"] == SYSTEM]
        head, empty = yield from self.fitting_head(head, repairs)
        body = [turn for turn in turns if turn["from"] != SYSTEM]
        pairs = [body[at : at + 2] for at in range(0, len(body), 2)]
        sizes = yield [head + one for one in pairs]
        runs = yield from self.runs(head, pairs, sizes, empty - self.frame)
        pieces: list[tuple[int, dict]] = []
        for first, last in runs:
            its_marks = marks if last == len(pairs) else {}
            if sizes[first] <= self.max_length:
                turns = head + sum(pairs[first:last], [])
                pieces.append((first, {"conversations": turns, **its_marks}))
            elif self.overlong == DROP:
                dropped["longer than the window"] += 1
            else:
                parts = yield from self.parts(head, *pairs[first], its_marks, repairs)
                pieces += [(first, part) for part in parts]
        if not pieces:
            raise Rejected("longer than the window")
        kept = list(named(conversation, pieces))
        return Kept(kept, dropped, repairs, pairs=len(pairs) - dropped.total())

    def runs(
        self, head: list[Turn], pairs: list[list[Turn]], sizes: list[int], shared: int
    ) -> Step:
        """Ranges of pairs that fit together; one of a single pair may not.

        `sizes` are the lengths of the pairs alone, and `shared` of what stands once before them.
        """
        runs, first = [], 0
        while first < len(pairs):
            last, total = first + 1, sizes[first]
            while last < len(pairs) and total + sizes[last] - shared <= self.max_length:
                total += sizes[last] - shared
                last += 1
            while last - first > 1 and total > self.max_length - SEAM * (last - first - 1):
                (total,) = yield [head + sum(pairs[first:last], [])]
                if total <= self.max_length:
                    break
                last -= 1
            runs.append((first, last))
            first = last
        return runs

    def fitting_head(self, head: list[Turn], repairs: Counter) -> Step:
        """The system turn, without its middle if it takes more than a third of the window, and the
        length of a conversation with nothing else in it."""
        if not head:
            return head, self.empty

        def around(text: str) -> list[Turn]:
            return [{**head[0], "value": text}, *pair("", "")]

        text, length = yield from self.fitting(head[0]["value"], self.max_length // 3, around)
        repairs["system turns shortened"] += text != head[0]["value"]
        return [{**head[0], "value": text}], length

    # ------------------------------------------------------------------ one pair that is too long

    def parts(
        self, head: list[Turn], question: Turn, answer: Turn, marks: dict, repairs: Counter
    ) -> Step:
        """Pieces that together hold the whole answer, each after as much context as fits."""

        def asked(text: str) -> list[Turn]:
            return [*head, {**question, "value": text}, {**answer, "value": ""}]

        text, at = answer["value"], marks.get("label_from", 0)
        whole = question["value"]
        first = yield from self.fitting(whole, self.max_length - LEAST_ANSWER, asked)
        again = yield from self.fitting(whole, self.max_length // 3, asked)
        repairs["questions shortened"] += first[0] != whole
        (starts,) = yield [text]
        pieces: list[dict] = []
        while not pieces or at < len(text):
            asking, length = again if at else first
            context = self.context(text, starts, at) if at else 0
            before = [*head, {**question, "value": asking}]
            end = yield from self.end(before, length, answer, starts, context, at)
            piece = {"conversations": [*before, {**answer, "value": text[context:end]}]}
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

        `length` is what is `before` it, in tokens.
        """
        text = answer["value"]
        first, new = bisect_left(starts, context), bisect_left(starts, at)
        room = self.max_length - length - (new - first)
        while room > 0:
            limit = new + room
            end = boundary(text, at, starts[limit]) if limit < len(starts) else len(text)
            reckoned = length + bisect_left(starts, end) - first
            if reckoned <= self.max_length - SEAM and is_apart(text, context, end):
                return end
            (total,) = yield [[*before, {**answer, "value": text[context:end]}]]
            if total <= self.max_length:
                return end
            room -= total - self.max_length
        return min(at + 1, len(text))

    def context(self, text: str, starts: list[int], at: int) -> int:
        """Where the repeated end of an answer begins: a quarter of the window before `at`."""
        first = bisect_left(starts, at) - self.max_length // 4
        if first <= 0:
            return 0
        word = re.compile(r"\s(?=\S)").search(text, starts[first], at)
        return word.end() if word else starts[first]

    def fitting(self, text: str, limit: int, around: Callable[[str], list[Turn]]) -> Step:
        """`text`, without its middle if what `around` makes of it is longer than `limit` tokens,
        and the length of that."""
        (length,) = yield [around(text)]
        if length <= limit:
            return text, length
        (starts,) = yield [text]
        kept = len(starts) - (length - limit)
        while kept > 1:
            left = text[: starts[kept // 2]]
            right = text[starts[len(starts) - kept // 2] :]
            shorter = (left.rpartition(" ")[0] or left) + GAP + (right.partition(" ")[2] or right)
            (length,) = yield [around(shorter)]
            if length <= limit:
                return shorter, length
            kept -= max(length - limit, 1)
        (length,) = yield [around(GAP.strip())]
        return GAP.strip(), length


def pair(question: str, answer: str) -> list[Turn]:
    """The turns of one question and its answer."""
    return [{"from": HUMAN, "value": question}, {"from": GPT, "value": answer}]


def boundary(text: str, at: int, end: int) -> int:
    """The best place to cut `text` in the second half between `at` and `end`; else `end`."""
    for pattern in BOUNDARIES:
        cuts = [match.start() for match in pattern.finditer(text, (at + end) // 2, end)]
        if cuts and cuts[-1] > at:
            return cuts[-1]
    return max(end, at + 1)


def is_apart(text: str, start: int, end: int) -> bool:
    """Whether white space or nothing stands before and after this part of `text`."""
    return (not start or text[start - 1].isspace()) and (end == len(text) or text[end].isspace())


def marks_of(conversation: Conversation, turns: list[Turn]) -> dict:
    """What an earlier splitting said of the last answer."""
    label_from = conversation.get("label_from", 0)
    if not isinstance(label_from, int) or not 0 <= label_from <= len(turns[-1]["value"]):
        raise Rejected("label_from is no place in the answer", f"it is {kind(label_from)}")
    return {name: conversation[name] for name in MARKS if name in conversation}


def named(conversation: Conversation, pieces: list[tuple[int, dict]]) -> Iterator[Conversation]:
    """Conversations of the pieces: `ID_4` starts with turn 4, `ID_4_1` goes on with its answer."""
    rest = {name: value for name, value in conversation.items() if name not in MARKS}
    parts: Counter = Counter()
    for first, piece in pieces:
        name = f"{conversation['id']}_{2 * first}" + (f"_{parts[first]}" if parts[first] else "")
        parts[first] += 1
        yield {**rest, "id": name if len(pieces) > 1 else conversation["id"], **piece}
