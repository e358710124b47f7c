"""A chat with a model: history, streamed answers, and a context that stays inside the window."""

import logging
from collections.abc import Iterator
from uuid import uuid4

from llama_lora.chat.sampling import Sampling, generator
from llama_lora.chat.streaming import Decoder
from llama_lora.cli import InputError
from llama_lora.text import sound_text

logger = logging.getLogger(__name__)


class Chat:
    """A conversation with a model.

    Attributes:
        decoder: what answers; may be changed at any time.
        system: the system message, or None for the template's own; may be changed at any time.
        turns: the conversation so far, as in a corpus: `[{"from": …, "value": …}, …]`.
        left_out: how many of its oldest pairs the model no longer sees.
    """

    def __init__(self, model, template, sampling: Sampling | None = None, system=None):
        """`model` is a causal language model, adapted or not; `template` a `Template`.

        Raises:
            InputError: the template uses tokens that the model does not know.
        """
        self.decoder = Decoder(model, template)
        self.system = system
        self._sampling = sampling or Sampling()
        self._random = generator(model, self._sampling.seed)
        self._has_warned = False
        self.reset()

    @property
    def stopped(self) -> bool:
        """Whether the last answer ended by itself, not at a limit or an interruption."""
        return self.decoder.finish_reason == "stop"

    def reset(self) -> None:
        """Forget the conversation, but not the system message."""
        self.turns, self.left_out = [], 0
        self._asked = None

    def stream(self, question: str) -> Iterator[str]:
        """Ask, and yield the answer piece by piece in whole characters.

        Question and answer join the history when the answer ends or the iterator is closed. An
        interrupted answer is kept as far as it goes; an answer without any text is not kept.

        Raises:
            InputError: the question alone fills the model's window, or the model's scores are not
                finite.
            OutOfMemory: what was said until then is kept as if it had been interrupted.
        """
        self._asked = self.turns, {"from": "human", "value": sound_text(question)}
        return self._answer()

    def regenerate(self) -> Iterator[str]:
        """`stream` the last question once more; the new answer replaces the old one.

        Raises:
            InputError: nothing has been asked.
        """
        if not self._asked:
            raise InputError("nothing has been asked yet")
        return self._answer()

    def conversation(self) -> dict:
        """The conversation as a record of a corpus."""
        return {"id": f"chat-{uuid4().hex[:12]}", "conversations": [*self._head(), *self.turns]}

    def _answer(self) -> Iterator[str]:
        before, asked = self._asked
        prompt = self._prompt([*before, asked])
        answer = ""
        try:
            for piece in self.decoder.stream(prompt, self._sampling, self._random):
                answer += piece
                yield piece
        finally:
            if answer:
                self.turns = [*before, asked, {"from": "gpt", "value": answer}]

    def _prompt(self, turns: list[dict]) -> list[int]:
        """The prompt, without the oldest pairs if there is no room for an answer otherwise."""
        prompter = self.decoder.prompter
        ids, left_out = prompter.fit(
            [*self._head(), *turns], self._sampling.max_new_tokens, self.left_out
        )
        if left_out > self.left_out and not self._has_warned:
            logger.warning(
                "(the conversation has outgrown the model's window of %s tokens: from here on its "
                "oldest questions and answers are left out)",
                f"{prompter.window:,}",
            )
            self._has_warned = True
        self.left_out = left_out
        return ids

    def _head(self) -> list[dict]:
        return [{"from": "system", "value": sound_text(self.system)}] if self.system else []
