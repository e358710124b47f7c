"""How soon an answer begins, and how fast it goes on."""

import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.gpu.contenders.contender import Contender
from benchmarks.gpu.contenders.lengths import SPECIAL
from benchmarks.gpu.rows import Row
from llama_lora.hardware.device import dtype_name

PROMPT, TOKENS = 256, 64  # of the question, for a base of full size, and of the answer


class Answers(Contender):
    """Whoever answers a question; no base that `gpu.base` makes ends an answer by itself."""

    def measure(self, row: Row) -> Iterator[dict]:
        draw = np.random.default_rng(0)
        words = self.shape.config.vocab_size
        prompt = draw.integers(SPECIAL, words, PROMPT // self.task.scale).tolist()
        self.times(prompt)  # sets things up
        began = time.perf_counter()
        first, *more = self.times(prompt)
        yield {
            "first_token": first - began,
            "answer_tokens": len(more) + 1,
            "answer_tokens_per_second": len(more) / (more[-1] - first),
            "dtype": dtype_name(self.model.dtype),
            **self.card.peak(),
        }

    def times(self, prompt: list[int]) -> list[float]:
        """When each token of the answer was there, by `time.perf_counter`."""
        raise NotImplementedError


class Ours(Answers):
    """As generate.py answers."""

    def load(self):
        from llama_lora.chat.adapters import load

        model, self.template, _ = load(self.task.folder, quantization=self.task.quantization)
        return model

    def times(self, prompt: list[int]) -> list[float]:
        from llama_lora.chat.sampling import Sampling, generator
        from llama_lora.chat.streaming import Decoder

        decoder, sampling = Decoder(self.model, self.template), Sampling(0, max_new_tokens=TOKENS)
        tokens = decoder.tokens(prompt, sampling, generator(self.model, seed=0))
        return [time.perf_counter() for _ in tokens]


class Reference(Answers):
    """transformers' own `generate`."""

    def load(self):
        base = self.plain_base()
        base.generation_config.pad_token_id = base.config.pad_token_id
        return base.eval()

    @torch.inference_mode()
    def times(self, prompt: list[int]) -> list[float]:
        ids, told = torch.tensor([prompt], device=self.card.device), Times()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            streamer=told,
        )
        return told.times


class Times:
    """A streamer of `generate`, which gets the prompt first and then each token."""

    def __init__(self):
        self.times, self.began = [], False

    def put(self, ids) -> None:
        if self.began:
            self.times.append(time.perf_counter())
        self.began = True

    def end(self) -> None:
        pass
