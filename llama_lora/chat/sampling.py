"""How an answer's tokens are chosen, and which of them end it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_lora.cli import InputError
from llama_lora.hardware.device import dtype_name

COLDEST = 1e-3  # below this, dividing the scores overflows, and the likeliest token wins anyway
TINIEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many tokens an answer may have.

    Args:
        temperature: 0 always chooses the likeliest token.
        top_p: sample from the likeliest tokens that together have this probability (Holtzman et
            al. 2020); 1 is off.
        top_k: sample from this many likeliest tokens; 0 is off.
        repetition_penalty: lowers the scores of tokens already in the answer (Keskar et al. 2019);
            1 is off. The prompt's tokens do not count: it holds the ends of earlier answers.
        seed: makes a chat, and each answer of a batch, repeatable; None: different every time.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None

    @classmethod
    def of(cls, args) -> "Sampling":
        """From a command line's flags of the same names."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def processors(
    sampling: Sampling,
    model,
    generators: Sequence[torch.Generator],
    prompt_length: int = 0,
) -> LogitsProcessorList:
    """Processors of scores [rows, vocabulary]; afterwards each row's largest is its next token.

    Args:
        generators: of random numbers, one per row, on the model's device.
        prompt_length: how many leading ids are the prompt's.
    """
    chain = LogitsProcessorList([Finite(dtype_name(model.dtype))])
    if sampling.repetition_penalty != 1:
        chain.append(
            RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty), prompt_length)
        )
    if sampling.temperature < COLDEST:
        return chain
    chain.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    chain.append(Gumbel(generators))
    return chain


class Finite(LogitsProcessor):
    """Refuses scores that no token can be chosen from."""

    def __init__(self, dtype: str):
        self._dtype = dtype

    def __call__(self, input_ids, scores):
        if not scores.isfinite().all():
            raise InputError(
                "the model's scores are not finite: its weights or the adapter's are damaged, or "
                f"overflow in {self._dtype}"
            )
        return scores


class Gumbel(LogitsProcessor):
    """Noise that makes the largest score a sample from their softmax (Gumbel 1954).

    Every row has its own generator, so its samples do not depend on the other rows.
    """

    def __init__(self, generators: Sequence[torch.Generator]):
        self._generators = generators

    def __call__(self, input_ids, scores):
        waits = torch.empty_like(scores)
        for row, generator in zip(waits, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - waits.clamp_min_(TINIEST).log_()


def generator(model, seed: int | None, number: int = 0) -> torch.Generator:
    """The `number`-th generator of random numbers for `seed`, on the model's device."""
    made = torch.Generator(model.device)
    if seed is None:
        made.seed()
    else:
        made.manual_seed(random.Random(f"{seed} {number}").getrandbits(63))
    return made


def stop_ids(model, template) -> set[int]:
    """The ids that end an answer: the template's, and those in the base's settings."""
    named = model.generation_config.eos_token_id
    return {*template.stop_ids, *(named if isinstance(named, list) else [named])} - {None}
