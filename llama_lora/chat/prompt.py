"""Prompts: what a person types is always text, and the prompt fits into the window."""

import re
from bisect import bisect_left
from itertools import count
from typing import NamedTuple

from llama_lora.cli import InputError
from llama_lora.model.folder.config import positions
from llama_lora.text import sound_text

PRIVATE = 0xF0000  # the first of 65,534 characters that Unicode leaves without a meaning


class TooLong(InputError):
    """The question alone leaves no room for an answer in the model's window."""


class Prompt(NamedTuple):
    """The token ids after which the model writes the answer, and how many pairs are left out."""

    ids: list[int]
    left_out: int


class Prompter:
    """Makes prompts from conversations that end with a question, for a window of tokens."""

    @classmethod
    def of(cls, model, template) -> "Prompter":
        """The prompter for `model`.

        Raises:
            InputError: the template uses tokens that the model has no embeddings for.
        """
        rows = model.get_input_embeddings().weight.shape[0]
        template.check_rows(rows, model.config.name_or_path)
        return cls(template, positions(model.config), rows)

    def __init__(self, template, window: int, rows: int):
        """`rows` counts the model's embeddings; a prompt with a token beyond them is refused."""
        self.window = window
        self._rows = rows
        self._template = template

    def fit(self, turns: list[dict], max_new_tokens: int, left_out: int = 0) -> Prompt:
        """The prompt, without the oldest pairs if there is no room for an answer otherwise.

        That is room for `max_new_tokens` or a quarter of the window, whichever is less. A system
        message stays. At least `left_out` pairs are left out.

        Raises:
            TooLong: the last question alone fills the window.
        """
        reserved = min(max_new_tokens, self.window // 4)
        head = turns[: turns[0]["from"] == "system"]
        pairs = (len(turns) - len(head) - 1) // 2

        def without(oldest: int) -> list[int]:
            return self.ids([*head, *turns[len(head) + 2 * oldest :]])

        left_out += bisect_left(
            range(left_out, pairs),
            True,
            key=lambda oldest: len(without(oldest)) + reserved <= self.window,
        )
        ids = without(left_out)
        if len(ids) >= self.window:
            raise TooLong(
                f"the prompt has {len(ids):,} tokens, which leaves no room for an answer in the "
                f"model's window of {self.window:,}"
            )
        return Prompt(ids, left_out)

    def ids(self, turns: list[dict]) -> list[int]:
        """The prompt as token ids, with the special tokens that the template writes and no others.

        If a turn spells out a special token, it is tokenized as plain text: typing "</s>" does not
        end a turn.

        Raises:
            InputError: a token that the model has no embedding for.
        """
        turns = [{**turn, "value": sound_text(turn["value"])} for turn in turns]
        if not self._template.spells_special(turns):
            return self._known(self._template.prompt_ids(turns))
        text, typed = self._rendered(turns)
        tokenizer = self._template.tokenizer
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = []
        for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            if typed.isdisjoint(range(start, end)):
                ids.append(token)
            else:
                spelled = text[start:end]
                ids += tokenizer.encode(
                    spelled, add_special_tokens=False, split_special_tokens=True
                )
        return self._known(ids)

    def _known(self, ids: list[int]) -> list[int]:
        """`ids`, after checking that each has a row of the embeddings."""
        self._template.check_ids(ids, self._rows, "the prompt")
        return ids

    def _rendered(self, turns: list[dict]) -> tuple[str, set[int]]:
        """The prompt as text, and where it has special tokens that turns spell out.

        They are found because a private character stands in for each while the template renders.
        """
        taken = {character for turn in turns for character in turn["value"]}
        free = (mark for mark in map(chr, count(PRIVATE)) if mark not in taken)
        marks = {}

        def marked(found: re.Match) -> str:
            if found[0] not in marks:
                marks[found[0]] = next(free)
            return marks[found[0]]

        special = self._template.special
        turns = [{**turn, "value": special.sub(marked, turn["value"])} for turn in turns]
        spelled = {mark: token for token, mark in marks.items()}
        text, typed = [], set()
        length = 0
        for character in self._template.prompt(turns):
            if character in spelled:
                typed.add(length)
            text.append(spelled.get(character, character))
            length += len(text[-1])
        return "".join(text), typed
