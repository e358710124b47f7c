"""Which tokens of a conversation are learned: those of each answer and the one that ends it."""

from bisect import bisect_left
from dataclasses import dataclass

from llama_lora.cli import InputError

IGNORE = -100  # the label that torch's cross-entropy skips

Span = tuple[int, int]  # first character, and the one after the last


@dataclass(frozen=True)
class Encoded:
    """A rendered conversation: token ids and, for each, the id to learn or `IGNORE`."""

    ids: list[int]
    labels: list[int]


def answer_spans(conversation: dict, text: str, spans: list[Span]) -> list[Span]:
    """The answers' `spans` in the rendered `text`; the last begins at its `label_from`."""
    label_from = conversation.get("label_from", 0)
    if not label_from or not spans:
        return spans
    start, end = spans[-1]
    turns = conversation["conversations"]
    answer = next(turn["value"] for turn in reversed(turns) if turn["from"] == "gpt")
    at = text.find(answer, start, end)
    return [*spans[:-1], (max(at, start) + label_from, end)]


def labels_of(
    ids: list[int],
    offsets: list[Span],
    spans: list[Span],
    special_ids: set[int],
    unfinished: bool,
    whose: str,
) -> list[int]:
    """For each token its id if it begins within one of the answers' `spans`, else `IGNORE`.

    Args:
        offsets: the span of characters that each of `ids` stands for.
        special_ids: ids of special tokens; the last one in a span ends its answer.
        unfinished: whether the last answer continues elsewhere, so that its end is not learned.
        whose: whose template it is, for messages.

    Raises:
        InputError: an answer ends with no special token.
    """
    labels = [IGNORE] * len(ids)
    starts = [start for start, _ in offsets]
    for start, end in spans:
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        # The text after the end-of-answer token ("\n" in ChatML) is never generated.
        while last > first and ids[last - 1] not in special_ids:
            last -= 1
        if last == first:
            raise InputError(
                f"{whose}: its chat template ends an answer with no special token, so the model "
                "would never stop; use --template vicuna_v1.1"
            )
        labels[first:last] = ids[first:last]
    if unfinished and spans:
        labels[last - 1] = IGNORE
    return labels
