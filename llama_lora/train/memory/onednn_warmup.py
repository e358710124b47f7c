"""Products compiled before a micro-batch fills the heap, in 16 bits on a CPU.

oneDNN compiles each product for the number of its tokens and keeps it for a while. One compiled
while activations are there lies between them, where the heap has a hole when they are gone, and the
holes grow with each step until they take more than what is held. One layer has the shapes of all.
"""

import torch

from llama_lora.model.adapter import trainable


def before(loss_of, model):
    """`loss_of`, a function of a micro-batch, with a warm-up before it where that saves memory.

    Not where layers recompute: large blocks are not in the heap then, see `allocator`.

    Args:
        model: a peft model, which `loss_of` computes with.
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
