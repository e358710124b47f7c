"""How much of the answers a split file leaves to learn, as the trainer renders its pieces."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import orjson

from llama_lora.corpus.records.conversation import GPT
from llama_lora.model.labels import IGNORE
from llama_lora.model.template import Template, load_tokenizer

BATCH = 500
EXPLANATION = (
    "The share of the tokens of all answers that the trainer labels once, twice or never, and the "
    "pieces that are longer than the window. Both split the same cleaned file; each piece is "
    "rendered, and cut to the window, as in training."
)
Name = tuple[str, int]  # of an answer: its conversation's id, and its number in it


def covered(source: Path, pieces: Path, base: Path, window: int, ours: bool) -> dict[str, int]:
    """Counts of answer tokens by how often they are labelled, and of pieces."""
    template = Template(load_tokenizer(base), "vicuna_v1.1")
    labelled = {name: np.zeros(len(text), np.int8) for name, text in answers(source)}
    written: Counter = Counter()  # characters of each answer up to the end of the piece before
    count = over = 0
    for batch in batches(items(pieces)):
        for piece, (text, spans), (starts, labels) in zip(
            batch,
            [template.render(piece["conversations"]) for piece in batch],
            tokens(template, batch),
            strict=True,
        ):
            count += 1
            over += len(labels) > window
            for name, offset, begin, end in places(piece, text, spans, written, ours):
                # An answer's first token may begin with the space before it.
                first = max(np.searchsorted(starts, begin, "right") - 1, 0)
                last = np.searchsorted(starts[:window], end)
                learnt = first + np.flatnonzero(labels[first:last] != IGNORE)
                if len(learnt):
                    after = learnt[-1] + 1
                    stop = min(starts[after], end) if after < len(starts) else end
                    where = slice(offset + max(starts[learnt[0]] - begin, 0), offset + stop - begin)
                    labelled[name][where] += 1
    times: Counter = Counter()
    for batch in batches(answers(source)):
        for (name, _), starts in zip(
            batch, starts_of(template, [text for _, text in batch]), strict=True
        ):
            times.update(np.minimum(labelled[name][starts], 2).tolist())
    return {"pieces": count, "over": over, "never": times[0], "once": times[1], "twice": times[2]}


def places(
    piece: dict, text: str, spans: list, written: Counter, ours: bool
) -> Iterator[tuple[Name, int, int, int]]:
    """For each answer of a piece its name, which of its characters the piece has first, and the
    characters that it takes in the piece's `text`."""
    conversation, first = origin(piece, ours)
    values = [turn["value"] for turn in piece["conversations"] if turn["from"] == GPT]
    for number, (value, (start, _)) in enumerate(zip(values, spans, strict=True)):
        name = conversation, first + number
        goes_on = number == len(values) - 1 and piece.get("label_from", 0)
        offset = written[name] - goes_on if goes_on else 0
        written[name] = offset + len(value)
        begin = text.index(value, start)
        yield name, offset, begin, begin + len(value)


def origin(piece: dict, ours: bool) -> tuple[str, int]:
    """The conversation that a piece is of, and the number of its first answer there."""
    if not ours:  # fschat's names end with the turn that the piece starts with
        conversation, _, turn = piece["id"].rpartition("_")
        return conversation, int(turn) // 2
    conversation = piece.get("piece_of", piece["id"])
    turn = piece["id"].removeprefix(conversation + "_").split("_")[0]
    return conversation, int(turn) // 2 if "piece_of" in piece else 0


def tokens(template: Template, batch: list[dict]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Where in the rendered text the tokens of each piece start, and their labels."""
    texts = [template.text(piece["conversations"]) for piece in batch]
    for encoded, starts in zip(
        template.encode_batch(batch), starts_of(template, texts), strict=True
    ):
        yield starts, np.array(encoded.labels)


def starts_of(template: Template, texts: list[str]) -> Iterator[np.ndarray]:
    backend = template.tokenizer.backend_tokenizer
    for one in backend.encode_batch(texts, add_special_tokens=False):
        yield np.array([start for start, _ in one.offsets], int)


def answers(source: Path) -> Iterator[tuple[Name, str]]:
    for item in items(source):
        values = [turn["value"] for turn in item["conversations"] if turn["from"] == GPT]
        yield from (((item["id"], number), value) for number, value in enumerate(values))


def items(path: Path) -> list[dict]:
    return orjson.loads(path.read_bytes())


def batches(rows: Iterable) -> Iterator[list]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    yield batch


def row(found: dict[str, int]) -> dict[str, str]:
    """The counts as cells of a table."""
    whole = found["never"] + found["once"] + found["twice"]
    return {
        **{
            f"labelled {times}": f"{found[times] / whole:.2%}"
            for times in ("once", "twice", "never")
        },
        "pieces": f"{found['pieces']:,}",
        "over-long": f"{found['over']:,}",
    }
