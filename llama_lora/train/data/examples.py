"""From a corpus file to token ids and labels."""

import os
import random
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_lora.cli import InputError
from llama_lora.corpus.records import conversation, reader
from llama_lora.corpus.records.json_values import parse
from llama_lora.model.labels import IGNORE
from llama_lora.model.template import VICUNA_V1_1, Template
from llama_lora.train.data import token_cache
from llama_lora.train.data.example import Example

BATCH_BYTES = 1 << 20  # of conversations tokenized in one call: enough to keep all cores busy
READ_AT_ONCE = 4096  # examples
MOST_CUT = 0.05  # of the answer tokens; if more is truncated, the user has to ask for it


class Examples:
    """A sequence of examples, each of which stays on disk until it is asked for.

    `lengths` are their lengths in tokens, int64; `sources` the conversations they are pieces of.
    """

    def __init__(self, rows, lengths: np.ndarray, sources: list[str]):
        self.rows, self.lengths, self.sources = rows, lengths, sources

    @classmethod
    def of(cls, rows) -> "Examples":
        """All examples that a `token_cache.Entry` holds."""
        import pyarrow.compute

        lengths = pyarrow.compute.list_value_length(rows.data["ids"]).to_numpy()
        return cls(rows, lengths.astype(np.int64), rows.data["source"].to_pylist())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[int(index)]
        id, source, ids, labelled = (column[0] for column in row.columns)
        ids, labelled = (part.values.to_numpy(zero_copy_only=False) for part in (ids, labelled))
        labels = np.where(labelled, ids, np.int32(IGNORE))
        return Example(id.as_py(), source.as_py(), ids, labels)

    def labelled(self) -> int:
        """The labelled tokens of all examples; this reads them all."""
        import pyarrow.compute as compute

        tables = self.rows.select_columns("labelled").iter(READ_AT_ONCE)
        return sum(compute.sum(compute.list_flatten(t["labelled"])).as_py() for t in tables)

    def check_ids(self, template: Template, rows: int, base) -> None:
        """Check that the `rows` of embeddings of `base` cover all tokens; this reads them all.

        Raises:
            InputError: the template or a conversation has a token beyond them.
        """
        import pyarrow.compute as compute

        template.check_rows(rows, base)
        tables = self.rows.select_columns("ids").iter(READ_AT_ONCE)
        if max(compute.max(compute.list_flatten(t["ids"])).as_py() for t in tables) < rows:
            return
        for example in map(self.__getitem__, range(len(self))):
            template.check_ids(example.ids, rows, f"conversation {example.id}")

    def select(self, indices: list[int]) -> "Examples":
        """The examples at `indices`; no token is copied."""
        return Examples(
            self.rows.select(indices), self.lengths[indices], [self.sources[i] for i in indices]
        )


@dataclass
class Audit:
    """What became of a corpus file: counts of examples and of their tokens.

    `cut` counts the answer tokens beyond the length in the `truncated` examples, `special` the
    examples whose text spells out a special token.
    """

    conversations: int = 0
    tokens: int = 0
    labelled: int = 0
    truncated: int = 0
    cut: int = 0
    unlabelled: int = 0
    special: int = 0

    def add(self, labels: np.ndarray, max_length: int) -> bool:
        """Count an example, of which `max_length` tokens are read; whether any is labelled."""
        learned = labels != IGNORE
        labelled = int(np.count_nonzero(learned[:max_length]))
        self.truncated += len(labels) > max_length
        self.cut += int(np.count_nonzero(learned)) - labelled
        if not labelled:
            self.unlabelled += 1
            return False
        self.conversations += 1
        self.tokens += min(len(labels), max_length)
        self.labelled += labelled
        return True

    @property
    def cut_share(self) -> float:
        """The share of all answer tokens that are cut off."""
        return self.cut / max(self.labelled + self.cut, 1)

    def __str__(self) -> str:
        labelled = self.labelled / max(self.tokens, 1)
        truncated = self.truncated / max(self.conversations + self.unlabelled, 1)
        return (
            f"{self.conversations:,} conversations · {self.tokens:,} tokens · "
            f"{self.labelled:,} labelled ({labelled:.1%}) · {self.truncated:,} truncated "
            f"({truncated:.1%}, with {self.cut_share:.1%} of the answer tokens) · "
            f"{self.unlabelled:,} left out: no answer within the length"
            f"{self._of_special() if self.special else ''}"
        )

    def _of_special(self) -> str:
        return (
            f" · {self.special:,} with a special token spelled out in the text; it is trained as "
            "that token, even as the end of an answer"
        )


def load_examples(
    path: str,
    template: Template,
    max_length: int,
    folder: str | None = None,
    allow_truncation: bool = False,
) -> tuple[Examples, Audit]:
    """Tokenize a corpus file, or reuse the tokens of an earlier run.

    Args:
        max_length: in tokens; what is beyond is cut off and counted.
        folder: where tokens are kept; None for `token_cache.default_folder()`.
        allow_truncation: whether more than `MOST_CUT` of the answer tokens may be cut off.

    Raises:
        InputError: it is not a corpus file, no token in it is labelled, or too many are cut off.
    """
    folder = Path(folder) if folder else token_cache.default_folder()
    entry = token_cache.Entry(folder, token_cache.key_of(path, template, max_length))
    if not entry.exists():
        audit = Audit()
        entry.write(_tokenized(path, template, max_length, audit), vars(audit))
    rows, counts = entry.read()
    audit = Audit(**counts)
    if audit.cut_share > MOST_CUT and not allow_truncation:
        raise InputError(_too_much_cut(path, template, max_length, audit))
    return Examples.of(rows), audit


def hold_out(examples: Examples, ratio: float, seed: int) -> tuple[Examples, Examples]:
    """Split into examples to train on and, of at least one conversation, examples to measure on.

    Pieces of one conversation repeat parts of each other, so they stay on the same side.
    """
    sources = list(dict.fromkeys(examples.sources))
    count = max(1, round(len(sources) * ratio))
    if count >= len(sources):
        raise InputError(f"--eval_ratio {ratio}: no conversation is left to train on")
    held = set(random.Random(seed).sample(sources, count))
    sides: dict[bool, list[int]] = {False: [], True: []}
    for index, source in enumerate(examples.sources):
        sides[source in held].append(index)
    return examples.select(sides[False]), examples.select(sides[True])


def _tokenized(path: str, template: Template, max_length: int, audit: Audit) -> Iterator[dict]:
    """The examples in columns, a batch at a time; `audit` counts them.

    The tokenizer itself keeps all cores busy, unless TOKENIZERS_PARALLELISM says "false".
    """
    for batch in _batches(_conversations(path)):
        columns: dict[str, list] = {name: [] for name in token_cache.schema().names}
        for item, encoded in zip(batch, template.encode_batch(batch), strict=True):
            labels = np.array(encoded.labels, np.int32)
            audit.special += template.spells_special(item["conversations"])
            if audit.add(labels, max_length):
                columns["id"].append(item["id"])
                columns["source"].append(item.get("piece_of", item["id"]))
                columns["ids"].append(np.array(encoded.ids[:max_length], np.int32))
                columns["labelled"].append(labels[:max_length] != IGNORE)
        yield columns
    if not audit.conversations:
        raise InputError(
            f"{path}: no token to learn: expected answers within {max_length} tokens, found none "
            f"in {audit.unlabelled} conversations"
        )


def _conversations(path: str) -> Iterator[tuple[int, dict]]:
    """The conversations as training reads them, each with its size in bytes."""
    from tqdm import tqdm

    size = os.path.getsize(path)
    with tqdm(
        desc="tokenizing", total=size, unit="B", unit_scale=True, disable=None, leave=False
    ) as bar:
        for record in reader.read(path, advance=bar.update):
            try:
                item, repairs = conversation.check(parse(record.raw)[0])
                turns = conversation.put_in_order(item["conversations"], repairs)
                keys = conversation.piece_keys_of(item, turns)
                yield len(record.raw), {**item, "conversations": turns, **keys}
            except (conversation.Rejected, ValueError) as error:
                reason = " ".join(filter(None, map(str, error.args)))
                raise InputError(
                    f"{path}: conversation {record.index} (byte {record.offset}): {reason}; "
                    "clean the file with fastchat/data/clean_sharegpt.py first"
                ) from error


def _batches(sized: Iterable[tuple[int, dict]]) -> Iterator[list[dict]]:
    batch, bytes_ = [], 0
    for size, item in sized:
        batch.append(item)
        bytes_ += size
        if bytes_ >= BATCH_BYTES:
            yield batch
            batch, bytes_ = [], 0
    if batch:
        yield batch


def _too_much_cut(path: str, template: Template, max_length: int, audit: Audit) -> str:
    """The error that refuses the corpus, with the command that splits it."""
    file = Path(path)
    command = ["python3", "fastchat/data/split_long_conversation.py", "--in", str(file), "--out"]
    command += [str(file.with_name(f"{file.name.split('.')[0]}_split.json"))]
    command += ["--model-name", template.tokenizer.name_or_path, "--max-length", str(max_length)]
    command += [] if template.jinja.endswith(VICUNA_V1_1) else ["--template", "model"]
    return (
        f"{path}: {audit.cut_share:.1%} of the answer tokens ({audit.cut:,} of "
        f"{audit.labelled + audit.cut:,}) are beyond --model_max_length {max_length}, at most "
        f"{MOST_CUT:.0%} may be: split the conversations with {shlex.join(command)}, or lose them "
        "with --allow_truncation True"
    )
