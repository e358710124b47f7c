"""The Hugging Face Trainer with our data, our log lines and an account of what was trained on."""

import resource
import sys
import time
import warnings

import torch
import transformers
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from llama_lora.model.hardware import device_name, dtype_name
from llama_lora.model.template import IGNORE
from llama_lora.train.packing import Rows, check_isolation, collate


class LoraTrainer(transformers.Trainer):
    """Trains the LoRA matrices of a peft model on rows of examples."""

    def __init__(self, model, args, template, rows: Rows, held_out: Rows | None):
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=template.tokenizer,
        )
        self.totals = Totals()
        self.add_callback(self.totals)
        self.remove_callback(PrinterCallback)
        self.add_callback(LogLine(self.totals))
        if rows.packing:
            self.add_callback(IsolationCheck())

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.totals.in_step = num_items_in_batch  # of all processes and micro-batches
        return super().training_step(model, inputs, num_items_in_batch)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Held-out loss per labelled token, over all processes.

        The Trainer's own averages over batches, and shows some examples twice to even out ranks.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        own = range(self.args.process_index, len(rows), self.args.world_size)
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for start in range(0, len(own), self.args.eval_batch_size):
            batch = collate([rows[i] for i in own[start : start + self.args.eval_batch_size]])
            count = int((batch["labels"] != IGNORE).sum())
            with self.accelerator.autocast():
                loss = self.model(**self._prepare_inputs(batch), use_cache=False).loss
            total += torch.tensor(
                [loss.item() * count, count], dtype=total.dtype, device=total.device
            )
        summed, count = self.accelerator.reduce(total).tolist()
        metrics = {f"{metric_key_prefix}_loss": summed / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def summary(self, quantization: str) -> dict:
        """What the run came to, over all processes and resumes."""
        trainable, total = self.model.get_nb_trainable_parameters()
        held_out = [log["eval_loss"] for log in self.state.log_history if "eval_loss" in log]
        return {
            "steps": self.state.global_step,
            "trainable_parameters": trainable,
            "parameters": total,
            "labelled_tokens": self.totals.labelled,
            "held_out_loss_before": held_out[0] if held_out else None,
            "held_out_loss_after": held_out[-1] if held_out else None,
            "minutes": self.totals.seconds() / 60,
            "peak_memory_bytes": peak_memory(),
            "processes": self.args.world_size,
            "device": device_name(),
            "compute_dtype": dtype_name(self.args.compute_dtype),
            "quantization": quantization,
        }


class Totals(TrainerCallback, ExportableState):
    """Labelled tokens of all processes and seconds of training; both survive a resume."""

    def __init__(self):
        self.labelled, self.in_step = 0, 0
        self.earlier, self.started = 0.0, time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic()
        if saved := state.stateful_callbacks.get("Totals"):
            self.labelled = saved["attributes"]["labelled"]
            self.earlier = saved["attributes"]["earlier"]

    def on_step_end(self, args, state, control, **kwargs):
        self.labelled += int(self.in_step)

    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.started

    def state(self) -> dict:
        return {"args": {}, "attributes": {"labelled": self.labelled, "earlier": self.seconds()}}


class IsolationCheck(TrainerCallback):
    """Checks packing before the first step, and not before a checkpoint is loaded: bitsandbytes'
    int8 layers accept no state after their first forward pass.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        check_isolation(model)


class LogLine(TrainerCallback):
    """One line a log, made for `tail -f`."""

    def __init__(self, totals: Totals):
        self.totals = totals
        self.first_step = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.first_step is None:  # not counting the evaluation before it
            self.first_step, self.started = state.global_step, time.monotonic()
            self.labelled, self.logged = self.totals.labelled, self.started

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            print(f"{self._where(state)} | held-out loss {logs['eval_loss']:.4f}", flush=True)
        elif "loss" in logs:
            parts = [
                self._where(state),
                f"epoch {logs['epoch']:.2f}",
                f"loss {logs['loss']:.4f}",
                f"lr {logs['learning_rate']:.2e}",
                f"grad {logs.get('grad_norm', 0.0):.3f}",
                f"{self._tokens_per_second():,.0f} labelled tokens/s",
                f"{peak_memory() / 2**30:.1f} GiB",
                f"{self._time_left(state)} left",
            ]
            print(" | ".join(parts), flush=True)

    @staticmethod
    def _where(state) -> str:
        width = len(str(state.max_steps))
        return f"step {state.global_step:>{width}}/{state.max_steps}"

    def _tokens_per_second(self) -> float:
        now, labelled = time.monotonic(), self.totals.labelled
        rate = (labelled - self.labelled) / max(now - self.logged, 1e-9)
        self.logged, self.labelled = now, labelled
        return rate

    def _time_left(self, state) -> str:
        done = max(state.global_step - self.first_step, 1)
        left = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
        hours, rest = divmod(round(left), 3600)
        return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def quieten(args) -> None:
    """Keep the log to what the user can act on, and each thing in it once."""
    # Libraries telling each other of names that they will change.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"transformers|torch|accelerate"
    )
    if args.process_index > 0 or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def peak_memory() -> int:
    """Most bytes this process held so far: of the card's memory, or without one of the host's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
