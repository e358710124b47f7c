"""Cross-entropy over the labelled tokens only, a chunk of logits at a time.

The logits of 28,672 tokens over a vocabulary of 32,000 take 3.7 GB in fp32, and their gradient as
much again. Here the gradient of the hidden states is computed together with the loss, as in Liger's
fused kernel (Hsu et al. 2024), so that no chunk's logits outlive the chunk. It is plain PyTorch,
which runs on every card and every CPU.
"""

import torch
from transformers.modeling_outputs import CausalLMOutput

from llama_lora.cli import InputError
from llama_lora.model.labels import IGNORE

CHUNK_BYTES = 64 << 20  # of fp32 logits; larger chunks are no faster


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy (fp32) of `hidden @ weight.T` at the labelled rows.

    hidden: [tokens, size]; weight: [vocabulary, size], frozen; labels: int64 [tokens] or `IGNORE`;
    labelled: int64, the rows that are not.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, labelled):
        gradient = torch.zeros_like(hidden) if hidden.requires_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunks = labelled.split(max(1, CHUNK_BYTES // (4 * len(weight))))
        room = torch.empty(len(chunks[0]), len(weight), device=weight.device)  # for all chunks
        products = (
            room if weight.dtype == room.dtype else torch.empty_like(room, dtype=weight.dtype)
        )
        for rows in chunks:
            words, logits = labels[rows, None], room[: len(rows)]
            product = products[: len(rows)]
            torch.mm(hidden[rows].to(weight.dtype), weight.t(), out=product)
            if products is not room:
                logits.copy_(product)
            largest = logits.amax(1, keepdim=True)
            right = logits.gather(1, words).sub_(largest)
            sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
            total += (sums.log() - right).sum()
            if gradient is not None:
                logits.div_(sums)  # now the probabilities
                logits.scatter_add_(1, words, torch.full_like(sums, -1))
                if products is not room:
                    product.copy_(logits)
                gradient[rows] = (product @ weight).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        # In place: nothing else uses it, and it is as large as the hidden states.
        return gradient.mul_(upstream.to(gradient.dtype)), None, None, None


def summed_loss(model, hidden: torch.Tensor, labels: torch.Tensor, labelled=None) -> torch.Tensor:
    """Summed cross-entropy (fp32) of the words that the head of `model` gives for hidden states.

    hidden: [tokens, size]; labels: int64 [tokens], of the token after each, or `IGNORE`; labelled:
    as in `linear_cross_entropy`.
    """
    return linear_cross_entropy(hidden, model.get_output_embeddings().weight, labels, labelled)


def linear_cross_entropy(hidden, weight, labels, labelled=None) -> torch.Tensor:
    """As `LinearCrossEntropy`; without `labelled`, a card is waited for to find it in `labels`."""
    if labelled is None:
        labelled = (labels != IGNORE).nonzero().squeeze(1)
    return LinearCrossEntropy.apply(hidden, weight, labels, labelled)


def compute_in_chunks(model) -> None:
    """Make `model`, a causal language model of transformers, return its loss without logits.

    With labels it returns only the loss: the sum over the labelled tokens, divided by
    `num_items_in_batch` or by their number. The head stays frozen. If it also gets `labelled`,
    where in a single row the labelled tokens are, nothing waits for a card.
    """
    whole = model.forward

    def forward(*args, labels=None, labelled=None, num_items_in_batch=None, **kwargs):
        kwargs.pop("example_labelled", None)  # of a micro-batch that was not split
        kwargs.pop("token_keys", None)  # where nothing takes them, see `lora_layers`
        if labels is None:
            return whole(*args, **kwargs)
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        targets = labels[:, 1:].reshape(-1)
        rows = None if labelled is None else labelled - 1  # whose next token it is
        total = summed_loss(model, hidden.flatten(0, 1), targets, rows)
        count = (targets != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=total / count)

    model.forward = forward


@torch.no_grad()
def check(model) -> None:
    """Check that the loss in chunks equals the loss from the model's own logits.

    Raises:
        InputError: it does not, because the head does more than multiply.
    """
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 33, device=model.device)[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    own = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    chunked = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    model.train(was_training)
    if not abs(own - chunked) <= 0.01 * abs(own):  # so that NaN fails, too
        raise InputError(
            f"{model.config.model_type}: this model's loss is {own:.4f}, but {chunked:.4f} from "
            "the weights of its head alone; only heads without bias, scale or cap can be trained"
        )
