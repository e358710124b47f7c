"""TRL's SFTTrainer, plain or as unsloth patches it, on a base of random weights."""

import tempfile
from collections.abc import Iterator

import torch

from benchmarks.gpu.contenders.contender import ALPHA, LEARNING_RATE, Clock, Contender
from benchmarks.gpu.rows import Row


class Trl(Contender):
    """TRL with the same LoRA and rows to a step; it pads each batch to its longest row."""

    def load(self):
        return self.plain_base()

    def lora(self):
        """What the trainer is to add to the model; None once it is there."""
        from peft import PeftModel

        return None if isinstance(self.model, PeftModel) else self.lora_config()

    def tokenizer(self):
        from llama_lora.model.template import load_tokenizer

        return load_tokenizer(self.task.folder)

    def measure(self, row: Row) -> Iterator[dict]:
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer

        pieces, clock = self.pieces(row), Clock(self.card, self.task.steps)

        class Ticks(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                clock.tick()

        with tempfile.TemporaryDirectory() as folder:
            trainer = SFTTrainer(
                model=self.model,
                args=SFTConfig(
                    output_dir=folder,
                    max_steps=self.task.steps + 1,
                    per_device_train_batch_size=row.batch,
                    max_length=row.length,
                    learning_rate=LEARNING_RATE,
                    optim="adamw_torch",
                    gradient_checkpointing=True,
                    packing=False,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    fp16=self.task.dtype == torch.float16,
                    bf16=self.task.dtype == torch.bfloat16,
                    use_cpu=not self.card.cuda,
                ),
                train_dataset=Dataset.from_list(
                    [{"input_ids": p.ids.tolist(), "labels": p.labels.tolist()} for p in pieces]
                ),
                processing_class=self.tokenizer(),
                peft_config=self.lora(),
                callbacks=[Ticks()],
            )
            self.model = trainer.model  # with the LoRA matrices, for the next row
            trained = trainer.train()
        share = self.task.steps * row.batch / len(pieces)
        yield self.found(clock, pieces, share) | {"loss": trained.training_loss}


class Unsloth(Trl):
    """unsloth's model, kernels and checkpointing in the trainer that it patches.

    Without dropout, which its fast path does not have.
    """

    def load(self):
        from unsloth import FastLanguageModel  # before any library that it patches

        task = self.task
        model, self._tokenizer = FastLanguageModel.from_pretrained(
            model_name=str(task.folder),
            max_seq_length=max(row.length for row in task.rows),
            dtype=task.dtype,
            load_in_4bit=task.quantization == "4bit",
            load_in_8bit=task.quantization == "8bit",
            trust_remote_code=False,
        )
        return FastLanguageModel.get_peft_model(
            model,
            r=task.first.rank,
            lora_alpha=ALPHA,
            lora_dropout=0,
            target_modules=list(task.first.targets),
            bias="none",
            use_gradient_checkpointing="unsloth",
            random_state=0,
        )

    def tokenizer(self):
        return self._tokenizer
