"""A conversation as training reads it: its text in segments, each learned or not."""

import argparse
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from llama_lora.cli import InputError
from llama_lora.corpus.engine import stage
from llama_lora.corpus.language.filter import language_of
from llama_lora.corpus.records import reader
from llama_lora.corpus.records.conversation import GPT, Conversation, Rejected, Turn, put_in_order
from llama_lora.model.labels import IGNORE
from llama_lora.model.template import Template
from llama_lora.report.statistics import as_trained, renderer

# The kinds of segments: context, learned, added by the template, cut off by the window.
PLAIN, TRAINED, FRAME, BEYOND = "plain", "trained", "frame", "beyond"
SPACE = re.compile(r"\s*")
HOLE = "\ue000"  # stands for the text of a turn; a private character that no template touches


@dataclass(frozen=True)
class Segment:
    """Text of one kind."""

    kind: str
    text: str


@dataclass(frozen=True)
class Block:
    """A turn, with what the template puts around it."""

    role: str
    segments: list[Segment]


@dataclass(frozen=True)
class ConversationView:
    """A conversation to look at; `tokens` and `labelled` are None without a tokenizer."""

    id: str
    index: int
    language: str
    blocks: list[Block]
    notes: list[str] = field(default_factory=list)
    tokens: int | None = None
    labelled: int | None = None


def view(
    conversation: Conversation, index: int, template: Template | None, max_length: int
) -> ConversationView:
    """The view of the `index`-th conversation of a file; training reads `max_length` tokens of it.

    Without a `template`, the characters alone decide what is learned.
    """
    about = conversation["id"], index, language_of(conversation["conversations"])
    try:
        item = as_trained(conversation)
    except Rejected as rejected:
        blocks = [
            Block(turn["from"], [Segment(PLAIN, turn["value"])])
            for turn in conversation["conversations"]
        ]
        return ConversationView(
            *about, blocks, [f"not trainable: {': '.join(filter(None, rejected.args))}"]
        )
    notes = notes_of(conversation, item)
    if template is None:
        return ConversationView(*about, blocks_by_character(item), notes)
    text, spans = template.render(item["conversations"])
    encoded = template.encode_batch([item])[0]
    offsets = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    kinds = kinds_of(text, encoded.labels, offsets["offset_mapping"], max_length)
    labelled = sum(label != IGNORE for label in encoded.labels[:max_length])
    if len(encoded.ids) > max_length:
        notes.append(f"{len(encoded.ids) - max_length:,} tokens beyond {max_length:,} are cut off")
    if not labelled:
        notes.append("left out: no answer within the length")
    blocks = blocks_by_token(item["conversations"], template, text, spans, kinds)
    return ConversationView(*about, blocks, notes, len(encoded.ids), labelled)


def notes_of(conversation: Conversation, item: Conversation) -> list[str]:
    """What to know about the conversation besides its text."""
    repairs: Counter = Counter()
    put_in_order(conversation["conversations"], repairs)
    notes = [f"dropped: {name}" for name in +repairs]
    if item.get("label_from"):
        notes.append("continues an earlier piece")
    if item.get("unfinished"):
        notes.append("continues in another piece")
    return notes


def blocks_by_character(item: Conversation) -> list[Block]:
    """Blocks in which every answer is learned, the last from `label_from` on."""
    turns = item["conversations"]
    blocks = []
    for number, turn in enumerate(turns):
        text = turn["value"]
        at = len(text) if turn["from"] != GPT else 0
        if number == len(turns) - 1:
            at = item.get("label_from", 0)
        parts = Segment(PLAIN, text[:at]), Segment(TRAINED, text[at:])
        blocks.append(Block(turn["from"], [part for part in parts if part.text]))
    return blocks


KINDS = [PLAIN, TRAINED, FRAME, BEYOND]


def kinds_of(text: str, labels: list[int], offsets: list, max_length: int) -> bytearray:
    """For each character of the rendered `text`, the index of its kind in `KINDS`."""
    kinds = bytearray(len(text))
    for number, ((start, end), label) in enumerate(zip(offsets, labels, strict=True)):
        kind = BEYOND if number >= max_length else PLAIN if label == IGNORE else TRAINED
        kinds[start:end] = bytes([KINDS.index(kind)]) * (end - start)
    return kinds


def blocks_by_token(
    turns: list[Turn], template: Template, text: str, spans: list, kinds: bytearray
) -> list[Block]:
    """One block per turn; together they are `text`, character for character.

    `spans` are the answers in it. If the template changes the turns' texts in a way that cannot be
    followed, there is a single block.
    """
    places = places_of(turns, template, text)
    if places is None:
        return [Block("", segments(text, kinds, 0, len(text)))]
    at = 0
    for start, end in [*places, (len(text), len(text))]:
        for i in range(at, start):
            if KINDS[kinds[i]] == PLAIN:
                kinds[i] = KINDS.index(FRAME)
        at = end
    answer_ends = iter(end for _, end in spans)
    ends = [
        next(answer_ends) if turn["from"] == GPT else SPACE.match(text, end).end()
        for turn, (_, end) in zip(turns, places, strict=True)
    ]
    ends[-1] = len(text)
    return [
        Block(turn["from"], segments(text, kinds, start, end))
        for turn, start, end in zip(turns, [0, *ends], ends, strict=False)
    ]


def places_of(turns: list[Turn], template: Template, text: str) -> list[tuple[int, int]] | None:
    """Where the turns' own texts are in the rendered `text`; None if they cannot be found."""
    first, *frames = template.text([{**turn, "value": HOLE} for turn in turns]).split(HOLE)
    if len(frames) != len(turns):
        return None
    for form in (str, str.strip):
        values = [form(turn["value"]) for turn in turns]
        pairs = list(zip(values, frames, strict=True))
        if first + "".join(value + frame for value, frame in pairs) != text:
            continue
        places, at = [], len(first)
        for value, frame in pairs:
            places.append((at, at + len(value)))
            at += len(value) + len(frame)
        return places
    return None


def segments(text: str, kinds: bytearray, start: int, end: int) -> list[Segment]:
    """`text` from `start` to `end` in runs of one kind."""
    runs = []
    for kind, run in groupby(range(start, end), key=kinds.__getitem__):
        size = sum(1 for _ in run)
        runs.append(Segment(KINDS[kind], text[start : start + size]))
        start += size
    return runs


def find(args: argparse.Namespace, wanted: str) -> ConversationView:
    """The conversation with the number `wanted` in the file, from 0, or the first with that id."""
    found, damages = None, []
    if wanted.isdecimal():
        found, damages = first(args, lambda record: record.index == int(wanted))
    if not found:
        found, damages = first(args, lambda record: id_of(record) == wanted)
    stage.tell(damages)
    if not found:
        raise InputError(f"{args.inputs}: no conversation has the number or id {wanted!r}")
    one = stage.reading(found)
    if one.rejected:
        reason = ": ".join(filter(None, one.rejected.args))
        where = f"conversation {found.index} (byte {found.offset})"
        raise InputError(f"{args.inputs}: {where}: {reason}")
    template = renderer(args.model, args.template)
    return view(one.conversation, found.index, template, args.max_length)


def first(
    args: argparse.Namespace, is_wanted: Callable[[reader.Record], bool]
) -> tuple[reader.Record | None, list[str]]:
    """The first record that is wanted, and the damage found on the way."""
    damages: list[str] = []
    with ExitStack() as stack:
        records = stage.tracked([args.inputs], args, damages, stack)
        return next((record for _, record in records if is_wanted(record)), None), damages


def id_of(record: reader.Record) -> str | None:
    """The id of a conversation; None if the record is not one."""
    one = stage.reading(record)
    return None if one.rejected else one.conversation["id"]


def sample(args: argparse.Namespace, chosen: set[int]) -> Iterator[ConversationView]:
    """Views of the conversations whose index is in `chosen`, in the order of the file."""
    build = partial(Viewer, args.model, args.template, args.max_length)
    with ExitStack() as stack:
        records = stage.tracked([args.inputs], args, [], stack)
        those = (one for one in records if one[1].index in chosen)
        chunks = stage.chunked(those, stage.CHUNK_BYTES)
        for views in stack.enter_context(closing(stage.mapped(chunks, build, args.workers))):
            yield from views


class Viewer:
    """Makes views of chunks of records, in a worker process."""

    def __init__(self, model: str | None, template: str, max_length: int):
        self.renderer, self.max_length = renderer(model, template), max_length

    def __call__(self, chunk: list, at: Callable[[int], None]) -> list[ConversationView]:
        views = []
        for number, (_, record) in enumerate(chunk):
            at(number)
            conversation = stage.reading(record).conversation
            views.append(view(conversation, record.index, self.renderer, self.max_length))
        return views


def choose(begin: int, read: int, unreadable_at: list[int], most: int) -> set[int]:
    """Indices of at most `most` conversations, at random but the same from run to run."""
    sound = sorted(set(range(begin, begin + read)).difference(unreadable_at))
    return set(random.Random(0).sample(sound, min(most, len(sound))))
