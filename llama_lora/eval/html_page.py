"""The evaluation as one HTML page that needs neither network nor scripts, and as JSON beside it.

The page's policy allows the one style in it, by its hash, and nothing else. All text of the models
and the corpus is escaped.
"""

import json
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import numpy as np

from llama_lora.chat.adapters import BASE
from llama_lora.chat.detokenizer import REPLACEMENT
from llama_lora.cli import InputError
from llama_lora.corpus.records.atomic_files import Outputs
from llama_lora.corpus.records.partial_results import PartialResults
from llama_lora.eval import charts
from llama_lora.eval.answers import Exchange
from llama_lora.eval.bootstrap import DRAWS, Estimate
from llama_lora.eval.evaluation import Evaluation, percent
from llama_lora.eval.held_out_loss import ADAPTER, HeldOut, Look, perplexity
from llama_lora.model.labels import IGNORE
from llama_lora.report.html_frame import environment, part, policy

HTML, JSON = "evaluation.html", "evaluation.json"
LEVELS = 0.2, 1, 3  # nats; from each on, the change of a token's loss gets a stronger colour
FEW = 20  # conversations; with fewer, an interval is rather too narrow


@contextmanager
def opened(
    folder: Path, settings: dict
) -> Iterator[tuple[MutableMapping, Callable[[Evaluation], None]]]:
    """Measurements by name, and a function that writes both files from what was measured.

    The files are put in place together when the block ends well. Until then the measurements lie
    beside them, and the next run with these `settings` continues after the last. Problems with the
    folder are found now and not after the measuring.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; cannot write there") from None
    with PartialResults(str(folder / JSON), settings, "measurements") as kept:
        with writing(folder) as write:
            yield kept, write
        kept.remove()


@contextmanager
def writing(folder: Path) -> Iterator[Callable[[Evaluation], None]]:
    """A function that writes both files, which are put in place together."""
    with Outputs() as outputs:
        page, account = (outputs.open(str(folder / name)) for name in (HTML, JSON))

        def write(found: Evaluation) -> None:
            page.write(rendered(found).encode())
            account.write(json.dumps(found.as_json(), indent=1, ensure_ascii=False).encode())

        yield write


def rendered(found: Evaluation) -> str:
    """The page."""
    style = part("report/page.css") + part("eval/page.css")
    made = environment()
    made.filters.update(
        share=percent,
        signed=charts.signed,
        estimate=charts.shown,
        perplexity=perplexity,
    )
    held_out = found.held_out
    compared = held_out is not None and held_out.change is not None
    return made.get_template("eval/page.html").render(
        policy=policy(style),
        style=style,
        name=name_of(found),
        found=found,
        held_out=held_out,
        base=BASE,
        adapter=ADAPTER,
        figures=list(figures(found)),
        verdict=verdict(held_out.change) if compared else "",
        few=FEW,
        draws=DRAWS,
        intervals=charts.intervals(held_out.losses) if held_out else "",
        changes=charts.changes(held_out.conversations) if compared else "",
        looks=list(looks(held_out)) if compared else [],
        rates=found.rates,
        categories=categories(found.asked),
        excerpt=lambda look: excerpt(look, found.templates[ADAPTER].tokenizer),
    )


def name_of(found: Evaluation) -> str:
    """What the page is about: the folder's name, whatever path led to it."""
    folder = found.args.lora_weights or found.args.base_model
    return folder.resolve().name


def figures(found: Evaluation) -> Iterator[tuple[str, str]]:
    """The figures to see first, each with its label."""

    def moved(values: list[str], label: str) -> tuple[str, str]:
        return " → ".join(values), label

    if held_out := found.held_out:
        losses = held_out.losses.values()
        yield moved([f"{loss.value:.3f}" for loss in losses], "held-out loss")
        yield moved([f"{perplexity(loss).value:,.2f}" for loss in losses], "perplexity")
        if held_out.change:
            count = f"{len(held_out.better):,} of {len(held_out.conversations):,}"
            yield count, "conversations better"
    if found.asked:
        rates = found.rates.values()
        yield moved([percent(one.stopped) for one in rates], "answers not cut off")
        yield moved([percent(one.repetition) for one in rates], "repeated in an answer")


def verdict(change: Estimate) -> str:
    """One sentence: is the adapter better on these conversations?"""
    if change.low is None:
        return "One conversation is too few to tell whether it got better."
    if change.low <= 0 <= change.high:
        return "On these conversations, the difference may be chance."
    found = "better" if change.high < 0 else "worse"
    return f"The adapter is {found} on these conversations, by more than chance explains."


def looks(held_out: HeldOut) -> Iterator[tuple[str, list[Look]]]:
    """The conversations that changed most, under their headings."""
    for heading, sign in (("Improved most", -1), ("Got worse most", 1)):
        those = [look for look in held_out.looks if sign * look.conversation.change > 0]
        if those:
            yield heading, those


def excerpt(look: Look, tokenizer) -> list[tuple[str, str]]:
    """The text of a look in runs of one kind, each with the class of its kind."""
    kinds = [
        kind_of(float(change)) if label != IGNORE else "context"
        for label, change in zip(look.example.labels, look.changes, strict=True)
    ]
    pieces = zip(kinds, texts(look.example.ids, tokenizer), strict=True)
    runs = [
        (kind, "".join(text for _, text in run))
        for kind, run in groupby(pieces, key=lambda piece: piece[0])
    ]
    return [*runs, ("context", f" … {look.left:,} more tokens")] if look.left else runs


def kind_of(change: float) -> str:
    """The class of a token by the change of its loss: the larger, the stronger its colour."""
    level = sum(abs(change) >= step for step in LEVELS)
    return f"{'better' if change < 0 else 'worse'}-{level}" if level else "same"


def texts(ids: np.ndarray, tokenizer) -> Iterator[str]:
    """The text that each token completes; none for one that ends within a character."""
    shown = 0  # characters
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        complete = text if end == len(ids) else text.rstrip(REPLACEMENT)
        # An incomplete character may hide complete ones before it until it is complete.
        yield complete[shown:]
        shown = max(shown, len(complete))


def categories(asked: list[Exchange]) -> dict[str, list[Exchange]]:
    """The questions by category, in the order of the file."""
    found: dict[str, list[Exchange]] = {}
    for one in asked:
        found.setdefault(one.question.category, []).append(one)
    return found
