"""Answers to many conversations: in batches of similar length, with transformers' `generate`."""

import logging
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from random import SystemRandom
from typing import NamedTuple

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from llama_lora.chat.detokenizer import text_of
from llama_lora.chat.prompt import Prompter, TooLong
from llama_lora.chat.sampling import Sampling, generator, processors, stop_ids
from llama_lora.cli import InputError, out_of_memory
from llama_lora.model import growing_cache
from llama_lora.model.folder.config import positions
from llama_lora.model.folder.shape import head_size

logger = logging.getLogger(__name__)

CPU_ROWS = 8  # more hardly helps a few cores, and makes each answer wait for the longest
CARD_ROWS = 64
CARD_SHARE = 0.7  # of the free memory that the caches of a batch may take


class Answer(NamedTuple):
    """The answer to the `index`-th conversation.

    `finish_reason` is "stop" if it ended by itself and "length" at a limit. It is "empty" if there
    was no question, and "too_long" if the question alone fills the window; then there is no text.
    `tokens` are the answer's ids without the one that ends it.
    """

    index: int
    text: str
    finish_reason: str
    tokens: list[int]


def answers(
    model,
    template,
    conversations: Sequence[list[dict]],
    settings: Sampling,
    batch_size: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[Answer]:
    """Answer the last question of each conversation; the longest prompts come first.

    Args:
        model: a causal language model, adapted or not, in any precision.
        template: the `Template` to prompt with.
        conversations: turns as in a corpus, `[{"from": …, "value": …}, …]`: a system message if
            there is one, then alternating questions and answers, last a question.
        settings: a seed makes each answer repeatable, whatever it shares a batch with.
        batch_size: conversations at a time; None: as many as fit in memory. It is halved if that
            turns out to be too many.
        numbers: with the seed, they decide each conversation's random numbers; default: its index.

    Raises:
        RuntimeError: a single conversation does not fit into memory.
        InputError: a prompt holds a token that the model has no embedding for.
    """
    if settings.seed is None:
        settings = replace(settings, seed=SystemRandom().getrandbits(63))
    prompter = Prompter.of(model, template)
    numbers = numbers or range(len(conversations))
    order, lengths = [], array("Q", bytes(8 * len(conversations)))
    shortened = 0
    for index, turns in enumerate(conversations):
        if not turns[-1]["value"].strip():
            yield Answer(index, "", "empty", [])
            continue
        try:
            prompt = prompter.fit(turns, settings.max_new_tokens)
        except TooLong:
            yield Answer(index, "", "too_long", [])
            continue
        except InputError as error:
            raise InputError(f"prompt {numbers[index] + 1}: {error}") from error
        order.append(index)
        lengths[index] = len(prompt.ids)
        shortened += prompt.left_out > 0
    if shortened:
        logger.warning(
            "(%d conversations are longer than the model's window of %s tokens: their oldest "
            "questions and answers are left out)",
            shortened,
            f"{prompter.window:,}",
        )
    order.sort(key=lambda index: -lengths[index])
    writer = BatchWriter(model, template, settings)
    while order:
        rows = batch_size or rows_that_fit(model, lengths[order[0]], settings)
        batch, prompts = order[:rows], {}
        for index in batch:
            prompts[index] = prompter.fit(conversations[index], settings.max_new_tokens).ids
        try:
            written = writer.write(prompts, numbers)
        except RuntimeError as error:
            if len(batch) == 1 or not out_of_memory(error):
                raise
            written = None
        if written is None:  # the error, which held what was computed, is gone
            batch_size = len(batch) // 2
            torch.cuda.empty_cache()
            logger.warning(
                "(out of memory with %d at a time; from now on %d at a time)",
                len(batch),
                batch_size,
            )
            continue
        yield from written
        order = order[len(batch) :]


def rows_that_fit(model, prompt_length: int, settings: Sampling) -> int:
    """How many answers to prompts of this length to write at a time, by their caches' size."""
    if model.device.type != "cuda":
        return CPU_ROWS
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config)
    per_row = per_token * model.dtype.itemsize * (prompt_length + settings.max_new_tokens)
    free, _ = torch.cuda.mem_get_info()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(1, min(CARD_ROWS, int((free + cached) * CARD_SHARE) // per_row))


class BatchWriter:
    """Writes the answers of a batch with `generate`, without any of the base's own settings."""

    def __init__(self, model, template, settings: Sampling):
        # Adapters sit inside the base's layers, so its own `generate` uses them.
        self._model = getattr(model, "get_base_model", lambda: model)()
        self._tokenizer = template.tokenizer
        self._settings = settings
        rows, pad = self._model.get_input_embeddings().weight.shape[0], self._tokenizer.pad_token_id
        self._pad = pad if pad < rows else 0  # any id will do: it is masked, or after the end
        self._stop_ids = stop_ids(model, template)

    def write(self, prompts: dict[int, list[int]], numbers: Sequence[int]) -> list[Answer]:
        """The answers to prompts (token ids by index), padded on the left to the longest."""
        width = max(map(len, prompts.values()))
        limits = [self._limit(prompt) for prompt in prompts.values()]
        seed = self._settings.seed
        written = self._generate(
            prompts.values(),
            width,
            processors(
                self._settings,
                self._model,
                [generator(self._model, seed, numbers[index]) for index in prompts],
                width,
            ),
            limits,
        )
        return [
            self._answer(index, row[:limit])
            for index, row, limit in zip(prompts, written, limits, strict=True)
        ]

    def _limit(self, prompt: list[int]) -> int:
        window = positions(self._model.config)
        return min(self._settings.max_new_tokens, window - len(prompt))

    def _generate(self, prompts, width: int, chain, limits: list[int]) -> list[list[int]]:
        device, pad = self._model.device, self._pad
        ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device
        )
        with torch.inference_mode(), plain_settings(self._model):
            rows = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=growing_cache.by_layer(self._model.config, width + max(limits)),
                generation_config=GenerationConfig(
                    max_new_tokens=max(limits),
                    do_sample=False,
                    eos_token_id=sorted(self._stop_ids),
                    pad_token_id=pad,
                ),
                logits_processor=chain,
                stopping_criteria=StoppingCriteriaList(
                    [RowLimits(torch.tensor(limits, device=device) + width)]
                ),
            )
        return rows[:, width:].tolist()

    def _answer(self, index: int, ids: list[int]) -> Answer:
        end = next((at for at, token in enumerate(ids) if token in self._stop_ids), None)
        reason = "length" if end is None else "stop"
        return Answer(index, text_of(self._tokenizer, ids[:end]), reason, ids[:end])


class RowLimits(StoppingCriteria):
    """Ends each row at its own length."""

    def __init__(self, lengths: torch.Tensor):
        self._lengths = lengths

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self._lengths


@contextmanager
def plain_settings(model):
    """Keep `generate` from using generation_config.json, which may set a temperature."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
