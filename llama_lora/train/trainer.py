"""The Hugging Face Trainer with our data, our gradients, and a count of what was trained on."""

from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object
from transformers import PrinterCallback

from llama_lora.cli import InputError
from llama_lora.model import adapter
from llama_lora.model.adapter import trainable
from llama_lora.train import checkpoints
from llama_lora.train.best_adapter import Best
from llama_lora.train.compute.dropout import keys_in_step
from llama_lora.train.data.packing import MicroBatches, collate
from llama_lora.train.logs import LogFile, LogLine, Totals
from llama_lora.train.memory import onednn_warmup
from llama_lora.train.memory.allocator import large_blocks_given_back
from llama_lora.train.memory.out_of_memory import Gradients, HeldOutParts
from llama_lora.train.preparation import Preparation
from llama_lora.train.stopping import Diverged, EarlyStop, OverflowGuard, Schedule, is_finite


class LoraTrainer(transformers.Trainer):
    """Trains the LoRA matrices of a peft model on micro-batches of examples."""

    def __init__(
        self,
        model,
        args,
        template,
        training: MicroBatches,
        held_out: MicroBatches | None,
        settings: dict,
        parts: int,
        part_tokens: int,
    ):
        """
        Args:
            settings: kept in each checkpoint, see `checkpoints.check_settings`.
            parts: how many parts a micro-batch is computed in from the start, each with at most
                `part_tokens` tokens.
        """
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=training,
            eval_dataset=held_out,
            processing_class=template.tokenizer,
        )
        # Older ones are removed when the new one is complete, not before.
        self.checkpoints_kept, args.save_total_limit = args.save_total_limit, None
        parameters = [parameter for _, parameter in trainable(model)]
        self.gradients = Gradients(parameters, self.tell, parts)
        self.held_out_parts = HeldOutParts(self.tell)
        self.settings = settings
        self.totals, self.best = Totals(), Best(args.early_stopping_patience)
        self.stop = EarlyStop(args.max_hours, self._any)
        self.remove_callback(PrinterCallback)
        for callback in (
            self.totals,
            Preparation(part_tokens, self.accelerator.autocast),
            Schedule(),
            LogLine(self.totals),
            LogFile(self.totals),
            self.best,
            self.stop,
            OverflowGuard(self.accelerator),
        ):
            self.add_callback(callback)

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's own, with autocast and a loss scale for fp16 on a CPU too.

        accelerate leaves both out there, without a word.
        """
        super().create_accelerator_and_postprocess()
        if self.args.fp16 and self.args.device.type == "cpu" and not self.is_deepspeed_enabled:
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    def tell(self, line: str) -> None:
        """Print `line` with the step, from any process."""
        print(f"step {self.state.global_step + 1}: {line}", flush=True)

    def train(self, *args, **kwargs):
        """Train; if the loss is not finite, save the state before it and end.

        Raises:
            InputError: the loss or a gradient was not finite; says where.
        """
        try:
            return super().train(*args, **kwargs)
        except Diverged as error:
            raise InputError(f"{error}; {self._save_before_divergence()}") from None
        except Exception as error:
            if "loss scale already at minimum" not in str(error):  # DeepSpeed's way of saying so
                raise
            what = f"step {self.state.global_step + 1}: the gradients overflow at any loss scale"
            raise InputError(f"{what}; {self._save_before_divergence()}") from None

    def create_optimizer(self, model=None):
        if self.args.loraplus_lr_ratio is None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        options["loraplus_weight_decay"] = self.args.weight_decay
        self.optimizer = create_loraplus_optimizer(
            self.model, kind, loraplus_lr_ratio=self.args.loraplus_lr_ratio, **options
        )
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Compute the gradients of a micro-batch apart, and hand them over as a whole."""
        self.model.train()
        self.totals.in_step = num_items_in_batch  # of all processes and micro-batches
        names, batch = inputs.pop("names"), self._prepare_inputs(inputs)
        batch["token_keys"] = keys_in_step(batch["token_keys"], self.state.global_step)

        def loss_of(part):
            return self.compute_loss(self.model, part, num_items_in_batch=num_items_in_batch)

        loss_of = onednn_warmup.before(loss_of, self.model)
        value, gradients = self.gradients.compute(loss_of, batch, self._loss_scale())
        self._check_finite(value, gradients, names)
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(self.gradients.as_loss(gradients), **options)
        return value

    def _loss_scale(self) -> float:
        """The factor of the loss for fp16."""
        if self.is_deepspeed_enabled:
            return float(getattr(self.model_wrapped.optimizer, "loss_scale", 1))
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler.get_scale() if scaler else 1.0

    def _check_finite(self, value, gradients, names) -> None:
        # In fp16 gradients overflow now and then; the loss scaler skips the step and scales less.
        checked = [value] if self.args.fp16 else [value, *gradients]
        here = not is_finite(checked)
        if self._any(here):
            what = (
                f"the loss is {value.item():g}" if not is_finite([value]) else "a gradient is nan"
            )
            found = gather_object([(what, names)] if here else [])
            raise Diverged(self.state.global_step + 1, *found[0])

    def _any(self, holds: bool) -> bool:
        """Whether it holds on any of the processes."""
        if self.args.world_size == 1:
            return holds
        flag = torch.tensor(float(holds), device=self.args.device)
        return bool(self.accelerator.reduce(flag).item())

    def _save_checkpoint(self, model, trial):
        """The Trainer's own; it is declared complete when every process has written its part."""
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        with checkpoints.checkpoint(folder, responsible=self.args.should_save):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            adapter.complete(folder, Path(self.model.name_or_path), self.args.base_name)
            checkpoints.finish(folder, self.settings, self.checkpoints_kept)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """The Trainer's own, with the learning rate that is asked for now."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        was = max(self.lr_scheduler.base_lrs)
        factor = self.args.learning_rate * (self.args.loraplus_lr_ratio or 1) / was
        if abs(factor - 1) < 1e-9:
            return
        self.tell(f"learning rate {self.args.learning_rate:g} instead of {was:g}")
        for name in ("base_lrs", "_last_lr"):
            rates = getattr(self.lr_scheduler, name)
            setattr(self.lr_scheduler, name, [rate * factor for rate in rates])
        for group in self.optimizer.param_groups:
            group["initial_lr"] *= factor
            group["lr"] *= factor

    def _save_before_divergence(self) -> str:
        step = self.state.global_step
        if step == 0 or not is_finite(self.gradients.parameters):
            return "the last checkpoint is intact; try a lower --learning_rate"
        folder = Path(self.args.output_dir, f"checkpoint-{step}")
        if not checkpoints.is_complete(folder):
            self._save_checkpoint(self.model_wrapped, None)
        return (
            f"the state before it is saved in {folder}; lower --learning_rate, or look at the "
            "conversations with fastchat/data/inspect_data.py --show ID"
        )

    @torch.no_grad()
    @large_blocks_given_back()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Held-out loss per labelled token, over all processes.

        The Trainer's own averages over batches, and repeats some examples to even out ranks.
        """
        held_out = self.eval_dataset if eval_dataset is None else eval_dataset
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for number in range(self.args.process_index, len(held_out), self.args.world_size):
            batch = collate([held_out[number]])
            del batch["names"]
            count = len(batch["labelled"])
            summed = self.held_out_parts.compute_in_parts(self._summed_loss, batch)
            total += torch.tensor([summed, count], dtype=total.dtype, device=total.device)
        summed, count = self.accelerator.reduce(total).tolist()
        metrics = {f"{metric_key_prefix}_loss": summed / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _summed_loss(self, parts: list[dict]) -> float:
        """Over the labelled tokens of all parts."""
        with self.accelerator.autocast():
            return sum(
                self.model(**self._prepare_inputs(part), num_items_in_batch=1).loss.item()
                for part in parts
            )

    def finish(self) -> None:
        """Measure the held-out loss once more, and restore the matrices with the lowest."""
        if self.eval_dataset is None:
            return
        step = self.state.global_step
        if not any(log["step"] == step and "eval_loss" in log for log in self.state.log_history):
            self.evaluate()
        self.accelerator.wait_for_everyone()
        if self.best.step not in (0, step):
            self.best.restore(self.args, self.model)
            if self.is_world_process_zero():
                self.tell(f"the best adapter is from step {self.best.step}; it is the one saved")
