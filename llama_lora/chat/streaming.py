"""Writes an answer token by token, for a person who reads along."""

from collections.abc import Callable, Iterator
from contextlib import closing

import torch
from transformers.cache_utils import Cache

from llama_lora.chat.detokenizer import Detokenizer
from llama_lora.chat.out_of_memory import OutOfMemory
from llama_lora.chat.prompt import Prompter
from llama_lora.chat.sampling import Sampling, processors, stop_ids
from llama_lora.cli import out_of_memory
from llama_lora.model import growing_cache


class Decoder:
    """A model that answers prompts made with one template.

    What it has computed for one prompt and answer is reused for the next one with the same
    beginning.

    Attributes:
        prompter: makes the prompts.
        finish_reason: of the last answer: "stop" if it ended by itself, "length" at a limit, ""
            while it is being written or if it was left unfinished.
    """

    def __init__(self, model, template, activate: Callable[[], None] = lambda: None):
        """`activate` is called before each use of `model`; it may switch to another adapter.

        Raises:
            InputError: the template uses tokens that the model does not know.
        """
        self.model = model
        self.prompter = Prompter.of(model, template)
        self.finish_reason = ""
        self._tokenizer = template.tokenizer
        self._activate = activate
        self._stop_ids = stop_ids(model, template)
        self._kept = self._empty()

    def stream(
        self, prompt: list[int], sampling: Sampling, random: torch.Generator
    ) -> Iterator[str]:
        """The answer to `prompt`, piece by piece in whole characters, without leading space."""
        text = Detokenizer(self._tokenizer)
        with closing(self.tokens(prompt, sampling, random)) as tokens:
            for token in tokens:
                if piece := text.put(token):
                    yield piece

    def tokens(
        self, prompt: list[int], sampling: Sampling, random: torch.Generator
    ) -> Iterator[int]:
        """The ids of the answer, without the one that ends it.

        Raises:
            OutOfMemory: nothing is kept of what was computed, and its memory is free again.
        """
        self.finish_reason = ""
        cache, cached = self._shared_with(prompt)
        fresh, answer = prompt[len(cached) :], []
        chain = processors(sampling, self.model, [random])
        try:
            for _ in range(min(sampling.max_new_tokens, self.prompter.window - len(prompt))):
                # A pass that is interrupted half-way leaves layers of two lengths.
                ids, cached = cached + fresh, None
                token = self._next(fresh, cache, chain, answer)
                cached = ids
                if token in self._stop_ids:
                    self.finish_reason = "stop"
                    return
                yield token
                answer.append(token)
                fresh = [token]
            self.finish_reason = "length"
            return
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        finally:
            if cached is not None:
                self._kept = cache, cached
        # By now the error is gone, and with it the tensors of the pass that failed.
        del cache
        torch.cuda.empty_cache()
        in_4bit = getattr(self.model, "is_loaded_in_4bit", False)
        raise OutOfMemory(len(prompt), len(answer), in_4bit)

    def _empty(self) -> tuple[Cache, list[int]]:
        """A cache, and the ids in it."""
        return growing_cache.whole(self.prompter.window), []

    def _shared_with(self, prompt: list[int]) -> tuple[Cache, list[int]]:
        """Take the cache, cut back to what it shares with the prompt, and the ids in it.

        Whoever takes it has it alone: a stream that was dropped but not yet closed cannot disturb
        the next one.
        """
        (cache, cached), self._kept = self._kept, self._empty()
        shared = 0
        for old, wanted in zip(cached, prompt[:-1], strict=False):
            if old != wanted:
                break
            shared += 1
        if not shared:
            return self._empty()
        cache.crop(shared - len(cached))
        return cache, cached[:shared]

    @torch.inference_mode()
    def _next(self, fresh: list[int], cache: Cache, chain, answer: list[int]) -> int:
        """The next token after the cache and the `fresh` ids, which join the cache."""
        self._activate()
        device = self.model.device
        scores = self.model(
            input_ids=torch.tensor([fresh], device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        answer = torch.tensor([answer], dtype=torch.long, device=device)
        return chain(answer, scores.float()).argmax().item()
