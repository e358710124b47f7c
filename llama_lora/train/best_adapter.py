"""The adapter with the lowest held-out loss, kept while training goes on."""

import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from llama_lora.model.adapter import trainable
from llama_lora.train import checkpoints

WEIGHTS = "trainable.safetensors"


# Its name is a key in the trainer's state of every checkpoint.
class Best(TrainerCallback, ExportableState):
    """Saves the trainable matrices at each new lowest held-out loss.

    With `patience`, it ends the training after that many evaluations in a row without a new lowest.
    """

    def __init__(self, patience: int | None = None):
        self.patience = patience
        self.loss, self.step, self.without = math.inf, 0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        if saved := state.stateful_callbacks.get("Best"):
            vars(self).update(saved["attributes"])
        kept = Path(args.output_dir, checkpoints.BEST, WEIGHTS)
        if not kept.is_file():
            self.loss, self.step = math.inf, 0
            return
        with safe_open(kept, "pt") as file:  # it may be newer than the checkpoint
            about = file.metadata()
        self.loss, self.step = float(about["loss"]), int(about["step"])

    def on_evaluate(self, args, state, control, metrics, model=None, **kwargs):
        if state.global_step == 0 or state.global_step == self.step:
            return  # before training, or repeated at the end
        if metrics["eval_loss"] < self.loss:
            self.loss, self.step, self.without = metrics["eval_loss"], state.global_step, 0
            if args.should_save:
                self._write(args, model)
            return
        self.without += 1
        if self.patience is not None and self.without >= self.patience:
            control.should_training_stop = True

    def _write(self, args, model) -> None:
        folder = Path(args.output_dir, checkpoints.BEST)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(model)}
        about = {"loss": repr(self.loss), "step": str(self.step)}
        with checkpoints.writing(folder):
            save_file(tensors, folder / (WEIGHTS + ".new"), metadata=about)
        (folder / (WEIGHTS + ".new")).replace(folder / WEIGHTS)

    @torch.no_grad()
    def restore(self, args, model) -> None:
        """Put the best matrices back into `model`."""
        saved = load_file(Path(args.output_dir, checkpoints.BEST, WEIGHTS))
        for name, parameter in trainable(model):
            parameter.copy_(saved[name])

    def state(self) -> dict:
        kept = {"loss": self.loss, "step": self.step, "without": self.without}
        return {"args": {}, "attributes": kept}
