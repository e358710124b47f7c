"""What is checked and set up in a loaded model before its first training step."""

import os
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from llama_lora.model.adapter import trainable
from llama_lora.train.compute import chunked_loss
from llama_lora.train.data.packing import check_isolation
from llama_lora.train.memory import gradient_checkpointing
from llama_lora.train.plan.memory_plan import gradient_bytes, optimizer_bytes
from llama_lora.train.plan.zero_memory import Zero


class Preparation(TrainerCallback):
    """Checks packing and sets up checkpointing before the first step."""

    def __init__(self, tokens: int, autocast):
        """`autocast` makes the context in which training computes."""
        self.tokens, self.autocast = tokens, autocast

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        base = model.get_base_model()
        hidden = base.config.get_text_config().hidden_size
        zero = Zero.of(args, args.compute_dtype.itemsize, args.world_size, hidden)
        reserved = bytes_to_come(OptimizerNames(args.optim).value, trainable(model), zero)
        with self.autocast():
            check_isolation(base)
            chunked_loss.check(base)
            said = gradient_checkpointing.set_up(
                base,
                args.recompute,
                self.tokens,
                args.offload_activations,
                args.mlp_tiles,
                reserved,
            )
        if state.is_world_process_zero:
            print(said, flush=True)
        unlink_shared_memory(args.process_index)


def bytes_to_come(optim: str, trained: list, zero: Zero | None = None) -> float:
    """Bytes that the first step allocates and keeps for the `trained` parameters, pairs with names.

    DeepSpeed has made its copy in fp32 before, but not the optimizer's states.
    """
    there = zero.optimizer(0) if zero else 0
    each = gradient_bytes(zero) + optimizer_bytes(optim, zero) - there
    return each * sum(parameter.numel() for _, parameter in trained)


def unlink_shared_memory(process: int) -> None:
    """Unlink the memory that DeepSpeed's processes share without a card, 69 MB each.

    Processes that have it open keep it until they end; DeepSpeed itself would leave it behind.
    """
    if not torch.distributed.is_initialized():
        return
    torch.distributed.barrier()  # every process has opened everything
    where = os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], process
    name = "_".join(map(str, ("deepspeed_allreduce_buffer", *where)))
    Path("/dev/shm", name).unlink(missing_ok=True)
