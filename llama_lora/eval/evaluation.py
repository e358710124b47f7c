"""An evaluation, from its arguments to its figures, and the figures in the terminal."""

import sys
from argparse import Namespace
from collections.abc import MutableMapping
from dataclasses import dataclass

from llama_lora.chat.adapters import BASE, load_adapters
from llama_lora.eval import answers, contamination, held_out_loss, questions
from llama_lora.eval.charts import shown, signed
from llama_lora.eval.held_out_loss import ADAPTER, HeldOut
from llama_lora.hardware.device import compute_dtype, dtype_name
from llama_lora.model.adapter import read_weights
from llama_lora.model.folder.config import check_folder, embedding_rows, load_config, positions
from llama_lora.model.modified import last_modified
from llama_lora.model.template import Template, has_tokenizer, load_template
from llama_lora.train.compute import attention_check
from llama_lora.train.data.examples import Audit, Examples


@dataclass(frozen=True)
class Evaluation:
    """What was measured of the `sides`, `BASE` first, and how.

    `setting` is the line that says what was loaded; `seen` are the conversations of the held-out
    corpus that the adapter was trained on, or None if its corpus is not known.
    """

    args: Namespace
    sides: list[str]
    setting: str
    templates: dict[str, Template]
    held_out: HeldOut | None
    seen: set[str] | None
    asked: list[answers.Exchange]

    @property
    def rates(self) -> dict[str, answers.Rates]:
        return {side: answers.rates(self.asked, side) for side in self.sides} if self.asked else {}

    def as_json(self) -> dict:
        found = {
            "base_model": str(self.args.base_model),
            "lora_weights": self.args.lora_weights and str(self.args.lora_weights),
            "setting": self.setting,
            "seed": self.args.seed,
        }
        if self.held_out:
            seen = None if self.seen is None else sorted(self.seen)
            found["held_out"] = {**self.held_out.as_json(), "trained_on": seen}
        if self.asked:
            found["answers"] = {
                "questions": str(self.args.questions),
                "max_new_tokens": self.args.max_new_tokens,
                "rates": {side: vars(rates) for side, rates in self.rates.items()},
                "asked": [one.as_json() for one in self.asked],
            }
        return found


def settings_of(args: Namespace) -> dict:
    """What the measurements depend on, in JSON's types."""
    names = "quantization", "max_length", "max_new_tokens", "eval_ratio", "limit", "seed"
    paths = args.base_model, args.lora_weights, args.data_path, args.questions
    files = last_modified(*(path for path in paths if path))
    settings = {name: getattr(args, name) for name in names}
    return settings | {"compute_dtype": dtype_name(compute_dtype()), "files": files}


def run(args: Namespace, kept: MutableMapping) -> Evaluation:
    """Measure what the arguments of evaluate.py ask for.

    Args:
        kept: measurements by name, including those of an earlier run.

    Raises:
        InputError: the input is wrong; this is found before the model is loaded, if possible.
    """
    check_folder(args.base_model)
    folders = {ADAPTER: args.lora_weights} if args.lora_weights else {}
    for folder in folders.values():
        read_weights(folder)
    sides = [BASE, *folders]
    asking = questions.read(args.questions, args.limit, args.seed) if args.questions else []
    examples, audit, seen = read_corpus(args) if args.data_path else (None, None, None)
    adapters, setting = load_adapters(args.base_model, folders, args.quantization)
    print(setting, file=sys.stderr)
    measured = adapters, sides, examples, audit, args, kept
    held_out = held_out_loss.measure(*measured) if examples else None
    limits = args.max_new_tokens, args.batch_size, kept
    asked = answers.ask(adapters, sides, asking, *limits) if asking else []
    return Evaluation(args, sides, setting, adapters.templates, held_out, seen, asked)


def read_corpus(args: Namespace) -> tuple[Examples, Audit, set[str] | None]:
    """The examples to measure on, the audit of the file, and the conversations seen in training."""
    attention_check.windows(args.base_model)  # refuses a base that cannot be measured
    config = load_config(args.base_model)
    limit = positions(config, packed=True)
    if args.max_length > limit:
        print(f"--max_length {limit}: {args.base_model} takes no more", file=sys.stderr)
        args.max_length = limit
    lora = args.lora_weights
    # Both sides are measured on the very same tokens.
    template = load_template(lora if lora and has_tokenizer(lora) else args.base_model)
    examples, audit = held_out_loss.load(args, template)
    examples.check_ids(template, embedding_rows(config), args.base_model)
    print(f"{args.data_path}: {audit}", file=sys.stderr)
    training = contamination.training_examples(lora, template) if lora else None
    if training is None:
        return examples, audit, None
    seen = contamination.seen(examples, training)
    if seen:
        print(
            f"warning: {len(seen):,} of {len(set(examples.sources)):,} conversations hold a "
            "question with its answer that the adapter was trained on: their loss says nothing "
            "about new ones",
            file=sys.stderr,
        )
    return examples, audit, seen


def summary(found: Evaluation) -> str:
    """The figures, in lines."""
    parts = []
    if found.held_out:
        parts.append("\n".join(loss_lines(found.held_out)))
    if found.asked:
        parts.append("\n".join(rate_lines(found)))
    return "\n\n".join(parts)


def loss_lines(held_out: HeldOut) -> list[str]:
    """The losses, and how many conversations they are from."""
    count, tokens = len(held_out.conversations), held_out.labelled
    lines = [
        f"loss per labelled token over {count:,} held-out conversations with {tokens:,} such "
        "tokens (95% interval)"
    ]
    for side, loss in held_out.losses.items():
        perplexity = held_out_loss.perplexity(loss).value
        lines.append(f"{side:<10}{shown(loss):<28}perplexity {perplexity:,.2f}")
    if held_out.change:
        counts = f"better in {len(held_out.better):,}, worse in {len(held_out.worse):,}"
        lines.append(f"{'change':<10}{shown(held_out.change, signed):<28}{counts}")
    return lines


def rate_lines(found: Evaluation) -> list[str]:
    """What can be counted in the answers."""
    heads = ["stopped", "looping", "repeated", "tokens", "language kept"]
    count = sum(len(one.question.turns) for one in found.asked)
    lines = [f"{count:,} answers".ljust(20) + "".join(f"{head:>14}" for head in heads)]
    for side, rates in found.rates.items():
        tokens = f"{rates.tokens:,.0f}"
        cells = [*map(percent, (rates.stopped, rates.loops, rates.repetition)), tokens]
        cells.append(percent(rates.in_language))
        lines.append(f"{side:<20}" + "".join(f"{cell:>14}" for cell in cells))
    return lines


def percent(share: float | None) -> str:
    """A share, or a dash if there is none."""
    return "–" if share is None else f"{share:.0%}"
