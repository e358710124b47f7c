"""Compiles products before a micro-batch fills the heap, in 16 bits on a CPU.

oneDNN compiles each product for its number of tokens and keeps it for a while. A product compiled
while activations are there lies between them, and leaves a hole in the heap when they are gone.
With each step there are more holes, until they take more memory than what is held. The warm-up
runs one layer, which has the shapes of all.
"""

import torch

from llama_lora.model.adapter import trainable


def before(loss_of, model):
    """`loss_of`, a function of a micro-batch, preceded by a warm-up where that saves memory.

    It saves none if layers recompute, since large blocks are not in the heap then, see `allocator`.

    Args:
        model: the peft model that `loss_of` computes with.
    """
    decoder = model.get_base_model().base_model
    layers = decoder.layers
    compiles = decoder.device.type == "cpu" and decoder.dtype.itemsize == 2
    if not compiles or any(layer.gradient_checkpointing for layer in layers):
        return loss_of
    matrices = [parameter for _, parameter in trainable(layers[0])]

    def warmed_up(batch):
        decoder.layers = layers[:1]
        try:
            with torch.random.fork_rng([]):
                torch.autograd.grad(loss_of(batch), matrices)
        finally:
            decoder.layers = layers
        return loss_of(batch)

    return warmed_up
