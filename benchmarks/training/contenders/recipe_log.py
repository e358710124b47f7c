"""What the recipes that this project is compared with log: the lines of its trainer_log.jsonl."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from benchmarks.pages import PRECISIONS
from llama_lora.model.labels import IGNORE
from llama_lora.train.logs import LOG
from llama_lora.train.memory.peak import peak_memory


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags that every recipe takes."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, help="base model folder")
    add("--data", type=Path, required=True, help="corpus file, split")
    add("--out", type=Path, required=True, help="folder for the adapter and the log")
    add("--steps", type=int, required=True, help="steps; the learning rate schedule fits them")
    add("--max-minutes", type=float, help="end before this many minutes of training")
    add("--quantization", choices=PRECISIONS, default="8bit", help="precision of the base")
    add("--seed", type=int, default=42, help="of the adapter's beginning, order and dropout")
    return parser


def parser_of_settings(doc: str, settings, default: str) -> argparse.ArgumentParser:
    """The same with flags for whose settings a recipe takes; "packed" ones have rows."""
    told = parser(doc)
    add = told.add_argument
    add("--settings", choices=settings, default=default, help="whose settings")
    add("--length", type=int, default=512, help="packed: tokens of a row")
    add("--batch", type=int, default=4, help="packed: rows of a step")
    return told


def every_step(args: argparse.Namespace) -> dict:
    """What all recipes tell the Trainer alike: this machine's fastest dtype, and a log to keep."""
    from llama_lora.hardware.device import compute_dtype

    return {
        "max_steps": args.steps,
        "seed": args.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "fp16": compute_dtype() == torch.float16,
        "bf16": compute_dtype() == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
    }


class RecipeLog(TrainerCallback):
    """Writes a line a step, and ends the run before one more step would exceed `max_minutes`.

    Before, it prints what an epoch holds, as `data {…}`. The clock starts with the first step:
    loading a model and tokenizing are nobody's time.
    """

    def __init__(self, out: Path, max_minutes: float | None):
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / LOG
        self.path.write_text("")
        self.limit = None if max_minutes is None else 60 * max_minutes
        self.labelled = self.longest = 0

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        print("data " + json.dumps(epoch(train_dataloader.dataset)), flush=True)
        model.register_forward_pre_hook(self.count_labels, with_kwargs=True)
        self.started = self.step_ended = time.monotonic()

    def count_labels(self, model, args, inputs):
        # The first token of a row has nothing before it that could predict it.
        self.labelled += int((inputs["labels"][:, 1:] != IGNORE).sum())

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        self.longest = max(self.longest, now - self.step_ended)
        self.step_ended = now
        if self.limit is not None and now - self.started + self.longest > self.limit:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        entry = {
            "step": state.global_step,
            "loss": logs["loss"],
            "labelled_tokens": self.labelled,
            "seconds": round(time.monotonic() - self.started, 3),
            "peak_memory_bytes": peak_memory(),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def epoch(dataset) -> dict[str, int]:
    """What one pass learns: its rows, the tokens in them that are not padding, and the labels."""
    rows = tokens = labelled = 0
    for row in dataset:
        rows += 1
        tokens += int(np.count_nonzero(row.get("attention_mask", np.ones_like(row["input_ids"]))))
        labelled += int((np.asarray(row["labels"])[1:] != IGNORE).sum())
    return {"rows": rows, "tokens": tokens, "labelled_tokens": labelled}
