"""A chat with a model: history, streamed answers, and a context that stays inside the window."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_lora.cli import InputError
from llama_lora.model.adapter import load_adapter, read_weights
from llama_lora.model.base import load_base
from llama_lora.model.hardware import device_name, dtype_name, resolve_quantization
from llama_lora.model.template import Template, load_tokenizer
from llama_lora.text import sound_text

logger = logging.getLogger(__name__)

COLDEST = 1e-3  # below this the scores overflow when divided, and the likeliest token wins anyway
REPLACEMENT = "\ufffd"  # what decoding yields for bytes that are not, or not yet, a character


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many tokens an answer may have.

    Args:
        temperature: 0 chooses the likeliest token, always.
        top_p: sample from the likeliest tokens that together have this probability (Holtzman et
            al. 2020); 1 is off.
        top_k: sample from this many likeliest tokens; 0 is off.
        repetition_penalty: lowers the scores of the answer's own tokens (Keskar et al. 2019); 1 is
            off. The prompt's are left alone: it holds the end-of-answer tokens of earlier answers.
        seed: makes a chat repeatable; None differs every time.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None


def load(base_model, lora_weights=None, quantization="none", template="auto"):
    """Load what a chat needs: the base, the adapter if there is one, and the template.

    Args:
        base_model: a Hugging Face model folder.
        lora_weights: an adapter folder. Its tokenizer and template are used where it has them.
        quantization: of the base's weights, as `--quantization`.
        template: as `Template`, or "auto": the tokenizer's own template, else vicuna_v1.1.

    Returns:
        The model, its `Template`, and a line that says what was loaded.

    Raises:
        InputError: a folder does not hold what it should, or the adapter is another base's.
    """
    quantization, reason = resolve_quantization(quantization)
    if lora_weights:
        read_weights(lora_weights)  # a wrong folder shows before the minutes a large base takes
    model = load_base(base_model, quantization)
    if lora_weights:
        model = load_adapter(model, lora_weights)
    has_tokenizer = lora_weights and (Path(lora_weights) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(lora_weights if has_tokenizer else base_model)
    if template == "auto":
        template = "model" if tokenizer.chat_template else "vicuna_v1.1"
    origin = f" of {tokenizer.name_or_path}" if template == "model" else ""
    summary = (
        f"{base_model}{f' with {lora_weights}' if lora_weights else ''} · {reason} · "
        f"{dtype_name(model.dtype)} on {device_name()} · template {template}{origin}"
    )
    return model, Template(tokenizer, template), summary


class Chat:
    """A conversation with a model.

    Attributes:
        system: the system message, or None for the template's own; may be changed at any time.
        turns: the conversation so far, as the corpus has it: `[{"from": …, "value": …}, …]`.
        stopped: whether the last answer ended by itself, not at a limit or an interruption.
    """

    def __init__(self, model, template, sampling: Sampling | None = None, system=None):
        """`model` is a causal language model, adapted or not; `template` a `Template`.

        Raises:
            InputError: the template's tokenizer has tokens that the model does not know.
        """
        self.system = system
        self.turns = []
        self.stopped = False
        self.window = model.config.max_position_embeddings
        self._model = model
        self._template = template
        self._sampling = sampling or Sampling()
        self._stop_ids = {*template.stop_ids, *_end_of_sequence_ids(model)}
        self._processors = _processors(self._sampling)
        self._generator = torch.Generator(model.device)
        if self._sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self._sampling.seed)
        self._first = 0  # turns before this one are no longer shown to the model
        self._has_warned = False
        self._cache, self._cached_ids = None, []
        self._check_vocabulary()

    def reset(self) -> None:
        """Forget the conversation, but not the system message."""
        self.turns, self._first = [], 0

    def stream(self, question: str) -> Iterator[str]:
        """Ask, and yield the answer piece by piece in whole characters.

        Question and answer join the history when the answer ends or the iterator is closed: what
        an interruption leaves of an answer is kept, an answer without any text is not.

        Raises:
            InputError: the question alone fills the model's window, or the model's scores are not
                finite.
        """
        asked = {"from": "human", "value": sound_text(question)}
        text, answer = TextStream(self._template.tokenizer), ""
        try:
            for token in self._tokens(self._prompt_ids(asked)):
                piece = text.put(token)
                piece = piece if answer else piece.lstrip()  # templates add a space or newline
                if piece:
                    answer += piece
                    yield piece
        finally:
            if answer:
                self.turns += [asked, {"from": "gpt", "value": answer}]

    def _prompt_ids(self, asked: dict) -> list[int]:
        """The prompt without as many of the oldest pairs as leave room for an answer."""
        reserved = min(self._sampling.max_new_tokens, self.window // 4)
        system = self.system and [{"from": "system", "value": sound_text(self.system)}]
        for first in range(self._first, len(self.turns) + 1, 2):
            ids = self._template.prompt_ids([*(system or []), *self.turns[first:], asked])
            if len(ids) + reserved <= self.window:
                break
        if len(ids) >= self.window:
            raise InputError(
                f"the prompt has {len(ids):,} tokens, which leaves no room for an answer in the "
                f"model's window of {self.window:,}"
            )
        if first > self._first and not self._has_warned:
            logger.warning(
                "(the conversation has outgrown the model's window of %s tokens: from here on its "
                "oldest questions and answers are left out)",
                f"{self.window:,}",
            )
            self._has_warned = True
        self._first = first
        return ids

    def _tokens(self, prompt: list[int]) -> Iterator[int]:
        """The ids of an answer, without the one that ends it."""
        self.stopped = False
        answer, fresh = [], self._not_cached(prompt)
        for _ in range(min(self._sampling.max_new_tokens, self.window - len(prompt))):
            token = self._choose(self._forward(fresh), answer)
            if token in self._stop_ids:
                self.stopped = True
                return
            yield token
            answer.append(token)
            fresh = [token]

    def _not_cached(self, prompt: list[int]) -> list[int]:
        """Cut the cache back to what it shares with the prompt; return the rest of the prompt."""
        shared = 0
        for cached, wanted in zip(self._cached_ids, prompt[:-1], strict=False):
            if cached != wanted:
                break
            shared += 1
        if shared:
            self._cache.crop(shared - len(self._cached_ids))
        else:
            self._cache = DynamicCache()
        self._cached_ids = prompt[:shared]
        return prompt[shared:]

    @torch.inference_mode()
    def _forward(self, fresh: list[int]) -> torch.Tensor:
        """Scores of the token after `fresh`: [1, vocabulary], float32."""
        # Empty until the pass is complete: one interrupted half-way leaves layers of two lengths.
        ids, self._cached_ids = self._cached_ids + fresh, []
        logits = (
            self._model(
                input_ids=torch.tensor([fresh], device=self._model.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )
        self._cached_ids = ids
        return logits

    def _choose(self, scores: torch.Tensor, answer: list[int]) -> int:
        if not scores.isfinite().all():
            raise InputError(
                "the model's scores are not finite: its weights or the adapter's are damaged, or "
                f"overflow in {dtype_name(self._model.dtype)}"
            )
        answer = torch.tensor([answer], dtype=torch.long, device=scores.device)
        scores = self._processors(answer, scores)
        if self._sampling.temperature < COLDEST:
            return scores.argmax().item()
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator).item()

    def _check_vocabulary(self) -> None:
        tokenizer, known = self._template.tokenizer, self._model.get_input_embeddings().weight
        if len(tokenizer) > known.shape[0]:
            raise InputError(
                f"{tokenizer.name_or_path}: its tokenizer has {len(tokenizer):,} tokens, the base "
                f"{self._model.config.name_or_path} only {known.shape[0]:,}"
            )


class TextStream:
    """Token ids in, whole characters out.

    A token may hold part of a character, and decoding one alone may lose a space, so each is
    decoded behind the piece before it.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._ids = []
        self._context = 0  # leading ids whose text is out
        self._shown = 0  # characters of the text of all ids that are out

    def put(self, token: int) -> str:
        """The text that `token` completes; "" for a special token or part of a character."""
        self._ids.append(token)
        text = self._decode()
        complete = text.rstrip(REPLACEMENT)
        piece = complete[self._shown :]
        self._shown += len(piece)
        if piece and text == complete:
            self._ids = self._ids[self._context :]
            self._context, self._shown = len(self._ids), len(self._decode())
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _processors(sampling: Sampling) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature < COLDEST:
        return processors
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


def _end_of_sequence_ids(model) -> list[int]:
    """The base's own, beside the template's: chat models name several in generation_config.json."""
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
