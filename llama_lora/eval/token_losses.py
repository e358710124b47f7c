"""The held-out loss of each example, with an adapter and without, in packed forward passes."""

import logging
import math
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from llama_lora.chat.adapters import Adapters
from llama_lora.cli import InputError
from llama_lora.model.labels import IGNORE
from llama_lora.train.compute import chunked_loss
from llama_lora.train.compute.packed_attention import BY_EXAMPLE
from llama_lora.train.data.example import Example
from llama_lora.train.data.examples import Examples
from llama_lora.train.data.packing import MicroBatches, check_isolation, collate
from llama_lora.train.memory.out_of_memory import HeldOutParts

logger = logging.getLogger(__name__)


class PassParts(HeldOutParts):
    """The same under evaluate.py's flags."""

    batches = "forward pass"
    ways = "--quantization 4bit, or a shorter --max_length"


def summed_losses(
    adapters: Adapters, sides: list[str], examples: Examples, max_length: int, kept: MutableMapping
) -> dict[str, np.ndarray]:
    """The summed cross-entropy (in nats, float64) over the labelled tokens of each example.

    Args:
        sides: names of `adapters`, to be measured one after the other.
        max_length: the most tokens in a forward pass; no example has more. If memory runs out, it
            is made in parts.
        kept: the losses of each pass by name; those it holds are not measured again.

    Returns:
        For each side an array of `len(examples)`.

    Raises:
        InputError: packing or the loss in chunks would not be exact for this model, or a loss is
            not finite.
        LocalError: a single example does not fit into memory.
    """
    packs = MicroBatches(examples, max_length, size=1)
    steps = len(packs) * len(sides)
    # Adapters sit inside the base's layers, so its own forward pass uses them.
    model = getattr(adapters.model, "get_base_model", lambda: adapters.model)()
    parts = PassParts(logger.warning)
    found = {}
    with (
        packing(model),
        tqdm(desc="held-out loss", total=steps, unit="pass", disable=None, leave=False) as bar,
    ):
        for side in sides:
            adapters.use(side)
            found[side] = np.zeros(len(examples))
            for number, members in enumerate(packs.members):
                name = f"losses of {side} in pass {number}"
                if name not in kept:
                    pack = [examples[i] for i in members]
                    losses = parts.compute_in_parts(partial(pack_losses, model), collate([pack]))
                    check_finite(side, pack, losses)
                    kept[name] = losses
                found[side][members] = kept[name]
                bar.update()
    return found


@contextmanager
def packing(model) -> Iterator[None]:
    """Keep the examples of a row apart in `model`, after checking both that and the loss."""
    whole, attention = vars(model).get("forward"), model.config._attn_implementation
    chunked_loss.compute_in_chunks(model)
    model.set_attn_implementation(BY_EXAMPLE)
    try:
        chunked_loss.check(model)
        check_isolation(model)
        yield
    finally:
        model.set_attn_implementation(attention)
        # `generate` looks at the signature of the model's own.
        del model.forward
        if whole is not None:
            model.forward = whole


@torch.no_grad()
def pack_losses(model, parts: list[dict]) -> list[float]:
    """The summed cross-entropy of each example of a row, from a forward pass for each part."""
    return [loss for part in parts for loss in part_losses(model, part)]


def part_losses(model, part: dict) -> list[float]:
    lengths = part["example_lengths"]
    hidden = model.base_model(
        input_ids=part["input_ids"].to(model.device),
        position_ids=part["position_ids"].to(model.device),
        example_lengths=lengths,
        use_cache=False,
    ).last_hidden_state[0]
    labels = part["labels"][0].to(model.device)
    return [
        chunked_loss.summed_loss(model, states[:-1], words[1:]).item()
        for states, words in zip(hidden.split(lengths), labels.split(lengths), strict=True)
    ]


def token_changes(
    adapters: Adapters, before: str, after: str, examples: list[Example]
) -> list[np.ndarray]:
    """What side `after` adds to the loss that side `before` has for each token of each example.

    Returns:
        For each example an array of its length; NaN for the first token, which has none before it.
    """
    found = {}
    for side in (before, after):
        adapters.use(side)
        found[side] = [token_losses(adapters.model, example) for example in examples]
    return [after - before for before, after in zip(found[before], found[after], strict=True)]


@torch.no_grad()
def token_losses(model, example: Example) -> np.ndarray:
    """The cross-entropy of each token of an example, labelled or not; NaN for the first."""
    ids = torch.from_numpy(example.ids.astype(np.int64)).to(model.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    return np.concatenate([[np.nan], losses.cpu().numpy()])


def check_finite(side: str, pack: list, losses: list[float]) -> None:
    """Raise `InputError` that names the first example whose loss is not finite."""
    for example, value in zip(pack, losses, strict=True):
        if not math.isfinite(value):
            raise InputError(
                f"conversation {example.id}: its loss with the {side} is {value:g}: the weights "
                "are damaged, or overflow in 16 bits"
            )


def labelled_counts(examples: Examples) -> np.ndarray:
    """How many tokens of each example the loss is summed over: all labelled ones but the first."""
    return np.array(
        [np.count_nonzero(examples[i].labels[1:] != IGNORE) for i in range(len(examples))]
    )
