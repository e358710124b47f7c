"""An example as the trainer has it, for the terminal: its tokens as text, with labels marked."""

from itertools import groupby

from llama_lora.model.labels import IGNORE
from llama_lora.model.template import Template
from llama_lora.report.conversation_view import PLAIN, TRAINED
from llama_lora.report.terminal import MEANINGS, mark, strong, visible
from llama_lora.train.data.example import Example

WIDTH, HEAD, TAIL = 100, 9, 5  # columns of a line; the lines shown of a long example


def shown(example: Example, template: Template, colour: bool) -> str:
    """The example in about `HEAD` + `TAIL` lines; colours or signs mark what is learned."""
    runs = [(kind, visible(text)) for kind, text in runs_of(example, template)]
    text = "".join(text for _, text in runs)
    lines = lines_of(text)
    heading = f"example {visible(example.id)} · {len(example.ids):,} tokens · "
    heading = strong(heading, colour) + mark(TRAINED, MEANINGS[TRAINED], colour)
    if len(lines) <= HEAD + TAIL + 1:
        return f"{heading}\n{marked(runs, 0, len(text), colour)}"
    head, tail = lines[HEAD], lines[-TAIL]
    return "\n".join(
        [
            heading,
            marked(runs, 0, head, colour).rstrip("\n"),
            strong(f"… {tail - head:,} characters …", colour),
            marked(runs, tail, len(text), colour),
        ]
    )


def runs_of(example: Example, template: Template) -> list[tuple[str, str]]:
    """The text of the tokens, in runs of one kind."""
    runs, end, before = [], 0, ""
    for learned, run in groupby(example.labels != IGNORE):
        end += sum(1 for _ in run)
        # Some tokenizers drop the first space of a text, so each run is what it adds to the whole.
        text = template.tokenizer.decode(example.ids[:end], clean_up_tokenization_spaces=False)
        runs.append((TRAINED if learned else PLAIN, text[len(before) :]))
        before = text
    return runs


def lines_of(text: str) -> list[int]:
    """The characters at which the lines of `text` begin on a terminal of `WIDTH` columns."""
    begins, at = [], 0
    for line in text.splitlines(keepends=True):
        begins += range(at, at + len(line), WIDTH)
        at += len(line)
    return begins


def marked(runs: list[tuple[str, str]], start: int, end: int, colour: bool) -> str:
    """The characters of `runs` from `start` to `end`, marked."""
    parts, at = [], 0
    for kind, text in runs:
        part = text[max(start - at, 0) : max(end - at, 0)]
        parts += [mark(kind, part, colour)] if part else []
        at += len(text)
    return "".join(parts)
