"""Checks that attention within examples is what a base computes.

First by its config, before any weights are loaded; then by its numbers, before the first step.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_lora.cli import InputError
from llama_lora.hardware.device import without_autocast
from llama_lora.model.folder.config import load_config, without_values
from llama_lora.text import brief
from llama_lora.train.compute.packed_attention import BY_EXAMPLE, attend_within_examples

ON_TRIAL, COMPARED = "by_example_on_trial", "by_example_compared"
WINDOW = 16  # tokens of a window during a comparison


def windows(folder) -> list[int | None]:
    """The window of each layer of the base in `folder`; None if a layer sees all earlier tokens.

    The layers are run on tensors without values, which takes no weights, no memory and a fraction
    of a second.

    Raises:
        InputError: there is no base, or it needs more than `attend_within_examples` computes.
    """
    found, lengths = {}, [1, 1]

    def record(module, query, key, value, attention_mask, **others):
        if others.get("example_lengths") != lengths:
            raise InputError(
                "its layers are not told where the examples of a row end; use another base"
            )
        found[module] = attention_mask
        return attend_within_examples(module, query, key, value, attention_mask, **others)

    AttentionInterface.register(ON_TRIAL, record)
    config = load_config(folder)
    try:
        model = without_values(config, ON_TRIAL, torch.bfloat16)
        ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
        # With a mask: without values, transformers cannot see whether positions restart.
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            example_lengths=lengths,
        )
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    except (
        *(ValueError, LookupError, ArithmeticError),
        *(AttributeError, TypeError, RuntimeError),
    ) as error:
        raise InputError(f"{folder}: cannot see how its layers attend: {brief(error)}") from error
    if len(found) != config.get_text_config().num_hidden_layers:
        raise InputError(f"{folder}: some of its layers have no attention; use another base")
    return list(found.values())


def _window_if_that_is_all(*, mask_function, local_size: int | None = None, **_):
    """As `packed_attention.window`; but the mask function if the mask is more than a window."""
    size = local_size or 4
    queries = torch.tensor([0, size - 1, size, size + 1, 2 * size])[:, None]
    keys = torch.arange(2 * size + 2)[None]
    seen = (keys <= queries) & (keys > queries - (local_size or len(keys[0])))
    zero = torch.tensor(0)
    try:
        same = torch.equal(mask_function(zero, zero, queries, keys).expand_as(seen), seen)
    except RuntimeError:  # it depends on tensors without values
        same = False
    return local_size if same else mask_function


AttentionMaskInterface.register(ON_TRIAL, _window_if_that_is_all)


@torch.no_grad()
def check(model) -> None:
    """Check that `attend_within_examples` equals the eager attention of each layer of `model`.

    Both are computed in fp32 from the same queries and keys, for an example that is longer than a
    window. Windows are cut to `WINDOW` tokens meanwhile, so that a short example is enough.
    (Comparing logits would tell little: with so short a window, a base is far from what it was
    trained for, and rounding alone may change them half as much as everything else.)

    Raises:
        InputError: they differ.
    """
    differences = []

    def compare(module, query, key, value, attention_mask, **options):
        window, mask = attention_mask
        given = query.float(), key.float(), value.float()
        eager = inspect.getmodule(type(module)).eager_attention_forward
        with without_autocast(query.device.type):
            found, _ = ALL_ATTENTION_FUNCTIONS[BY_EXAMPLE](module, *given, window, **options)
            expected, _ = eager(module, *given, mask.float(), **options)
        differences.append(((found - expected).abs().max() / expected.abs().max()).item())
        return found.to(query.dtype), None

    AttentionInterface.register(COMPARED, compare)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 4 * WINDOW, device=model.device)[None] % vocabulary
    with _attending(model, COMPARED, WINDOW):
        model(input_ids=ids, use_cache=False)
    for number, difference in enumerate(differences):
        if not difference <= 0.01:  # so that NaN fails, too
            raise InputError(
                f"{model.config.model_type}: the attention of layer {number} is off by "
                f"{difference:.2g} of what its own eager attention gives; use another base"
            )


def _compared_masks(**options) -> tuple:
    return ALL_MASK_ATTENTION_FUNCTIONS[BY_EXAMPLE](**options), eager_mask(**options)


AttentionMaskInterface.register(COMPARED, _compared_masks)


@contextmanager
def _attending(model, implementation: str, window: int) -> Iterator[None]:
    """Meanwhile the model attends by that implementation, and its windows have that size."""
    before, was_training = model.config._attn_implementation, model.training
    places = [model.config.get_text_config(), *model.modules()]
    places = [place for place in places if getattr(place, "sliding_window", None)]
    windows = [place.sliding_window for place in places]
    try:
        model.eval().set_attn_implementation(implementation)
        for place in places:
            place.sliding_window = window
        yield
    finally:
        for place, size in zip(places, windows, strict=True):
            place.sliding_window = size
        model.train(was_training).set_attn_implementation(before)
