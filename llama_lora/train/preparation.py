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
from llama_lora.train.plan.memory_plan import GRADIENT_BYTES, optimizer_bytes


class Preparation(TrainerCallback):
    """Checks packing and sets up checkpointing before the first step."""

    def __init__(self, tokens: int, autocast):
        """`autocast` makes the context in which training computes."""
        self.tokens, self.autocast = tokens, autocast

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        base = model.get_base_model()
        optim = None if args.deepspeed else OptimizerNames(args.optim).value
        reserved = bytes_to_come(optim, trainable(model))
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


def bytes_to_come(optim: str | None, trained: list) -> int:
    """Bytes that the first step allocates and keeps for the `trained` parameters, pairs with names.

    `optim` is None if the optimizer's states already exist.
    """
    states = optimizer_bytes(optim) if optim else 0
    return (GRADIENT_BYTES + states) * sum(parameter.numel() for _, parameter in trained)


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
