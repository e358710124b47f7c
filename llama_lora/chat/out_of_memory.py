"""Memory that runs out ends an answer, and not the chat."""

from llama_lora.cli import InputError


class OutOfMemory(InputError):
    """An answer has ended because memory ran out; what was written of it is sound."""

    def __init__(self, prompt: int, answer: int, in_4bit: bool):
        """`prompt` and `answer` are the tokens that it had and that fitted."""
        self._fitted = (
            f"after a prompt of {prompt:,} tokens, {answer:,} of the answer fitted"
            if answer
            else f"a prompt of {prompt:,} tokens does not fit"
        )
        self._lower = ["a shorter system message"]
        self._lower += ["a lower --max_new_tokens"] * (answer > 0)
        self._lower += ["--load_4bit"] * (not in_4bit)
        super().__init__(self.told("a shorter question"))

    def told(self, first: str) -> str:
        """The message; `first` is what takes less memory at the place where it is read."""
        return f"out of memory: {self._fitted}; what takes less: {', '.join([first, *self._lower])}"
