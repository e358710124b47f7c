"""The reference recipe of `reference_recipe.py`, on a base of random weights."""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.gpu.contenders.contender import ENOUGH, Clock, Contender, Optimization, autocast
from benchmarks.gpu.contenders.profiles import profile
from benchmarks.gpu.rows import Row
from llama_lora.model.labels import IGNORE


class Reference(Contender):
    """FastChat's: rows padded to the length, the plain loss, all layers recomputed."""

    def load(self):
        from peft import get_peft_model, prepare_model_for_kbit_training

        task, base = self.task, self.plain_base()
        base.config.use_cache = False
        recomputes = task.first.recompute == "True"
        if task.quantization != "none":
            base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=recomputes)
        elif recomputes:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads()
        return get_peft_model(base, self.lora_config())

    def measure(self, row: Row) -> Iterator[dict]:
        pieces = self.pieces(row)
        optimization = Optimization(self.model, row.optim, self.task.dtype, self.card.device)
        clock = Clock(self.card, self.task.steps)
        self.model.train()

        def step(number: int) -> torch.Tensor:
            members = pieces[number * row.batch : (number + 1) * row.batch]
            batch = {k: v.to(self.card.device) for k, v in padded(members, row.length).items()}
            with autocast(self.card.device, self.task.dtype):
                loss = self.model(**batch).loss
            optimization.step(loss)
            return loss

        while clock.goes_on():
            loss = step(clock.timed + 1)
            clock.tick()
        share = clock.timed * row.batch / len(pieces)
        found = self.found(clock, pieces, share) | {"loss": loss.item()}
        yield found
        if row.profiled and found["seconds_per_step"] < ENOUGH:
            yield found | profile(lambda: step(1), self.card)


def padded(examples: list, length: int) -> dict[str, torch.Tensor]:
    """Rows of `length` tokens: int64 [examples, length]."""

    def row(values: np.ndarray, filler: int) -> np.ndarray:
        return np.pad(values, (0, length - len(values)), constant_values=filler)

    columns = {
        "input_ids": [row(one.ids, 0) for one in examples],
        "labels": [row(one.labels, IGNORE) for one in examples],
        "attention_mask": [row(np.ones_like(one.ids), 0) for one in examples],
    }
    return {k: torch.from_numpy(np.stack(rows).astype(np.int64)) for k, rows in columns.items()}
