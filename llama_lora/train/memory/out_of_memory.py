"""The gradients of a micro-batch as a transaction: running out of memory leaves no trace.

A backward pass that breaks off has added to the gradients of some matrices and not of others, and
under ZeRO it has filled buffers that nothing empties. So the gradients are computed apart from the
optimizer, in as many parts as memory requires, and handed over when all of them are complete.
"""

from itertools import accumulate, islice
from operator import sub

import torch

from llama_lora.cli import LocalError, out_of_memory

AT_ONCE = 8  # gradients that are cast for an engine, which takes each of them away at once
ROW = "input_ids", "labels", "position_ids", "token_keys"  # [1, tokens] each


def split(batch: dict, parts: int) -> list[dict]:
    """A micro-batch of `packing.collate` in up to `parts` parts with about as many tokens each.

    With as many parts as examples, each part is one example. They are what the model takes.
    """
    lengths = batch["example_lengths"]
    parts = len(lengths) if parts >= len(lengths) else parts
    target = sum(lengths) / parts
    groups, filled = [[]], 0
    for length in lengths:
        full = parts == len(lengths) or filled + length / 2 > target * len(groups)
        if groups[-1] and full:
            groups.append([])
        groups[-1].append(length)
        filled += length
    sizes = [sum(group) for group in groups]
    rest = iter(batch["example_labelled"])
    labelled = batch["labelled"].split([sum(islice(rest, len(group))) for group in groups])
    columns = {
        **{key: batch[key].split(sizes, 1) for key in ROW},
        "labelled": map(sub, labelled, accumulate(sizes, initial=0)),
        "example_lengths": groups,
    }
    return [dict(zip(columns, part, strict=True)) for part in zip(*columns.values(), strict=True)]


class Parts:
    """Computes micro-batches in as few parts as fit into memory, and says when it takes more.

    `parts` is how many; a lack of memory doubles it, for the micro-batches that follow as well.
    """

    batches, stays = "micro-batch", "effective batch"
    ways = "--gradient_checkpointing True, --quantization 4bit, or a shorter --model_max_length"

    def __init__(self, tell, parts: int = 1):
        self.tell, self.parts = tell, parts

    def compute_in_parts(self, function, batch: dict):
        """What `function` makes of the list of parts of `batch`.

        Raises:
            LocalError: a single example does not fit.
        """
        while True:
            try:
                return function(split(batch, self.parts))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if self.parts >= len(batch["example_lengths"]):
                    longest = max(batch["example_lengths"])
                    raise LocalError(
                        f"out of memory at one example of {longest} tokens; try {self.ways}"
                    ) from None
            self.parts *= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.tell(
                f"out of memory: from now on, every {self.batches} is computed in {self.parts} "
                f"parts; the {self.stays} stays the same"
            )


class HeldOutParts(Parts):
    """The same where only a loss is measured."""

    batches, stays = "held-out micro-batch", "loss"
    ways = "--quantization 4bit, or a shorter --model_max_length"


class Gradients(Parts):
    """Computes the gradients of all trainable parameters, in parts that fit into memory."""

    def __init__(self, parameters: list[torch.nn.Parameter], tell, parts: int = 1):
        super().__init__(tell, parts)
        self.parameters = parameters

    def compute(self, loss_of, batch: dict, scale: float) -> tuple[torch.Tensor, list]:
        """The loss of `batch` and the fp32 gradients of all parameters.

        Args:
            loss_of: returns the loss of a part; the losses of the parts add up to that of the
                whole.
            scale: multiplies the loss before the backward pass, and divides the gradients after it,
                so that small ones are not lost in fp16.

        Raises:
            LocalError: a single example does not fit.
        """
        return self.compute_in_parts(lambda parts: self._summed(loss_of, parts, scale), batch)

    def _summed(self, loss_of, parts: list[dict], scale: float):
        total, gradients = 0.0, None
        for part in parts:
            loss = loss_of(part)
            new = _cast(torch.autograd.grad(loss * scale, self.parameters), [torch.float32])
            total = total + loss.detach()
            if gradients is None:
                gradients = new
            else:
                torch._foreach_add_(gradients, new)
            del new  # or they would be there while the next part is computed
        torch._foreach_mul_(gradients, 1 / scale)
        return total, gradients

    def as_loss(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """A scalar whose gradients are `gradients`, for an engine that calls backward itself.

        That overwrites them.
        """
        starts = range(0, len(gradients), AT_ONCE)
        some = [slice(start, start + AT_ONCE) for start in starts]
        return sum(_Known.apply(gradients[part], *self.parameters[part]) for part in some)


class _Known(torch.autograd.Function):
    """A scalar of no value to speak of, with gradients that are known."""

    @staticmethod
    def forward(ctx, gradients, *parameters):
        ctx.gradients, ctx.dtypes = gradients, [one.dtype for one in parameters]
        return gradients[0].new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        torch._foreach_mul_(ctx.gradients, upstream)
        return None, *_cast(ctx.gradients, ctx.dtypes)


def _cast(tensors, dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    """All `tensors` in these dtypes, or the one, in few operators instead of one for each."""
    pairs = list(zip(tensors, dtypes * (len(tensors) // len(dtypes)), strict=True))
    if all(tensor.dtype == dtype for tensor, dtype in pairs):
        return list(tensors)
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in pairs]
    torch._foreach_copy_(copies, tensors)
    return copies
