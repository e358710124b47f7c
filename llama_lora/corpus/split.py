"""Splitting: every piece fits the window as the trainer renders it, and no answer token is lost.

What fits stays whole. A longer conversation is cut between pairs, and an answer that is longer than
the window is continued in further pieces: each repeats the end of what came before as context
(`label_from` is the character of its last answer where the new text begins) and, but for the last,
has `"unfinished": true`, since the answer does not end there and no end must be learned.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Generator
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
    put_in_order,
)
from llama_lora.model.template import Template, load_tokenizer

CONTINUE, TRUNCATE, DROP = OVERLONG = ("continue", "truncate", "drop")
LEAST_ANSWER = 16  # tokens of an answer that a window must at least have room for
# Where an answer is cut, from the best place to the worst; each stands before the white space.
BOUNDARIES = [
    re.compile(r"\n\s*\n"),
    re.compile(r"(?<=[.!?…:;])(?=\s)|(?<=[。！？；])|\n"),
    re.compile(r"(?=\s)|(?<=[，、])"),
]
GAP = " … "  # in the place of the middle of a question

# What a splitting asks for on its way: the token counts of some turns.
Asking = Generator[list[list[Turn]], list[int], Any]


@dataclass
class Splitter:
    """Splits conversations to at most `max_length` tokens by the template of a model's folder."""

    model: str
    max_length: int
    template: str = "vicuna_v1.1"
    overlong: str = CONTINUE

    def __post_init__(self):
        self.renderer = Template(load_tokenizer(self.model), self.template)
        self.tokenizer = self.renderer.tokenizer.backend_tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        least = self.lengths([pair("", "")])[0]
        if self.max_length < least + 2 * LEAST_ANSWER:
            raise InputError(
                f"--max-length {self.max_length}: too short, the template of {self.model} alone "
                f"takes {least} tokens; expected at least {least + 2 * LEAST_ANSWER}"
            )

    def __call__(self, conversation: Conversation) -> Kept:
        (outcome,) = self.many([conversation])
        if isinstance(outcome, Rejected):
            raise outcome
        return outcome

    def many(self, conversations: list[Conversation]) -> list[Kept | Rejected]:
        """The outcome for each; what all of them ask for in a round is tokenized together."""
        outcomes: list = [None] * len(conversations)
        running = {number: self.split(one) for number, one in enumerate(conversations)}
        answers: dict[int, list[int] | None] = dict.fromkeys(running)
        while running:
            questions = {}
            for number, splitting in list(running.items()):
                try:
                    questions[number] = splitting.send(answers[number])
                except StopIteration as end:
                    outcomes[number] = end.value
                except Rejected as rejected:
                    outcomes[number] = rejected
                if outcomes[number] is not None:
                    del running[number]
            counts = iter(self.lengths([turns for asked in questions.values() for turns in asked]))
            answers = {n: [next(counts) for _ in asked] for n, asked in questions.items()}
        return outcomes

    def lengths(self, batch: list[list[Turn]]) -> list[int]:
        """How many tokens each of `batch` has when it is rendered."""
        texts = [self.renderer.text(turns) for turns in batch]
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(tokens) for tokens in encoded]

    # ------------------------------------------------------------------ one conversation

    def split(self, conversation: Conversation) -> Asking:
        """Returns `Kept`; see `Asking` for what it yields."""
        repairs, dropped = Counter(), Counter()
        turns = put_in_order(conversation["conversations"], repairs)
        (length,) = yield [turns]
        if length <= self.max_length:
            return Kept([{**conversation, "conversations": turns}], dropped, repairs)
        head = turns[:1] if turns[0]["from"] == SYSTEM else []
        head = yield from self.shortened_head(head, repairs)
        body = turns[len(turns) % 2 :]
        pairs = [body[i : i + 2] for i in range(0, len(body), 2)]
        sizes = yield [head + one for one in pairs]
        spans = yield from self.spans(head, pairs, sizes)
        pieces = []
        for first, last in spans:
            is_end = last == len(pairs)
            if last - first > 1 or sizes[first] <= self.max_length:
                piece = {"conversations": head + sum(pairs[first:last], [])}
                if is_end:
                    piece |= marks_of(conversation)
                pieces.append((first, piece))
            elif self.overlong == DROP:
                dropped["longer than the window"] += 1
            else:
                marks = marks_of(conversation) if is_end else {}
                parts = yield from self.parts(head, *pairs[first], marks, repairs)
                pieces += ((first, part) for part in parts)
        if not pieces:
            raise Rejected("longer than the window")
        return Kept(
            [*named(conversation, pieces, len(head))],
            dropped,
            repairs,
            pairs=len(pairs) - dropped.total(),
        )

    def spans(self, head: list[Turn], pairs: list[list[Turn]], sizes: list[int]) -> Asking:
        """Runs of pairs `[first, last)` that fit, as long as can be; of one pair if it alone does not."""
        (empty,) = yield [head + pair("", "")]
        spans, first = [], 0
        while first < len(pairs):
            # Pairs add up but for tokens that merge where they meet: count on it, then look.
            last, total = first + 1, sizes[first]
            while last < len(pairs) and total + sizes[last] - empty <= self.max_length:
                total += sizes[last] - empty
                last += 1
            while last - first > 1:
                (total,) = yield [head + sum(pairs[first:last], [])]
                if total <= self.max_length:
                    break
                last -= 1
            spans.append((first, last))
            first = last
        return spans

    def shortened_head(self, head: list[Turn], repairs: Counter) -> Asking:
        """The system turn, its middle left out if it takes more than a third of the window."""
        if not head:
            return head
        (length,) = yield [head + pair("", "")]
        (empty,) = yield [pair("", "")]
        if length <= max(self.max_length // 3, empty):
            return head
        repairs["system turns shortened"] += 1
        text = yield from self.without_middle(
            head[0]["value"], self.max_length // 3, lambda text: [{**head[0], "value": text}] + pair("", "")
        )
        return [{**head[0], "value": text}]

    # ------------------------------------------------------------------ one pair that is too long

    def parts(self, head: list[Turn], question: Turn, answer: Turn, marks: dict, repairs: Counter) -> Asking:
        """The pieces for a pair that is longer than the window, none of which loses a word."""
        text = answer["value"]
        at = marks.get("label_from", 0)
        room = self.max_length - LEAST_ANSWER
        asked = yield from self.fitted(head, question, room, repairs, "questions shortened")
        starts = self.starts(text)
        pieces: list[dict] = []
        while at < len(text):
            again = at > 0
            if again:
                asked = yield from self.fitted(head, question, self.max_length // 3)
            context = self.context(text, starts, at) if again else 0
            (taken,) = yield [head + [asked, {**answer, "value": text[context:at]}]]
            end = yield from self.furthest(head, asked, answer, text, starts, context, at, taken)
            piece = {"conversations": head + [asked, {**answer, "value": text[context:end]}]}
            if at > context:
                piece["label_from"] = at - context
            if end < len(text) or marks.get("unfinished"):
                piece["unfinished"] = True
            pieces.append(piece)
            at = end
            if self.overlong == TRUNCATE:
                break
        if at < len(text):
            repairs["answers truncated"] += 1
        elif len(pieces) > 1:
            repairs["answers continued"] += 1
        return pieces
