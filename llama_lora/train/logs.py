"""What a run reports as it goes: one line per step, the same as JSON, and a picture."""

import json
import math
import sys
import time
import warnings
from pathlib import Path

import transformers
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from llama_lora.hardware.cards import GIB
from llama_lora.train.memory.peak import peak_memory

LOG = "trainer_log.jsonl"
PICTURE = "loss.png"
REDRAW_SECONDS = 20


# Its name is a key in the trainer's state of every checkpoint.
class Totals(TrainerCallback, ExportableState):
    """Labelled tokens of all processes and seconds of training; resuming keeps both."""

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


class LogLine(TrainerCallback):
    """One line per log, for `tail -f`."""

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
            loss = logs["eval_loss"]
            told = f"held-out loss {loss:.4f} | perplexity {math.exp(min(loss, 700)):.2f}"
            print(f"{self._where(state)} | {told}", flush=True)
        elif "loss" in logs:
            parts = [
                self._where(state),
                f"epoch {logs['epoch']:.2f}",
                f"loss {logs['loss']:.4f}",
                f"lr {logs['learning_rate']:.2e}",
                f"grad {logs.get('grad_norm', 0.0):.3f}",
                f"{self._tokens_per_second():,.0f} labelled tokens/s",
                f"{peak_memory() / GIB:.1f} GiB",
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


class LogFile(TrainerCallback):
    """Keeps `trainer_log.jsonl` and `loss.png` in the output folder."""

    def __init__(self, totals: Totals):
        self.totals, self.drawn, self.ended = totals, time.monotonic(), False

    def on_train_begin(self, args, state, control, **kwargs):
        """Drop what was logged after the checkpoint that this run resumes from."""
        self.path = Path(args.output_dir, LOG)
        if not state.is_world_process_zero:
            return
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_log(self.path) if entry["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs or ()):
            return
        entry = {
            "step": state.global_step,
            "steps": state.max_steps,
            **logs,
            "labelled_tokens": self.totals.labelled,
            "seconds": round(self.totals.seconds(), 3),
            "peak_memory_bytes": peak_memory(),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if time.monotonic() - self.drawn > REDRAW_SECONDS or self.ended:
            self.draw()

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.ended = True
            self.draw()

    def draw(self) -> None:
        draw(read_log(self.path), self.path.with_name(PICTURE))
        self.drawn = time.monotonic()


def read_log(path: Path) -> list[dict]:
    """The entries of a `trainer_log.jsonl`, without a last line that was cut off."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def draw(entries: list[dict], path: Path) -> None:
    """A picture of the smoothed training loss and the held-out loss over the steps."""
    from matplotlib.figure import Figure

    figure = Figure((8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss per labelled token")
    trained = [(e["step"], e["loss"]) for e in entries if "loss" in e]
    held_out = [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="training")
        axes.plot(steps, smoothed(losses), color="#1f5fa8", linewidth=2, label="smoothed")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, "o-", color="#d1495b", linewidth=1.5, label="held out")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5")
    if trained or held_out:
        axes.legend(frameon=False)
    new = path.with_name(path.name + ".new")
    figure.savefig(new, format="png")
    new.replace(path)


def smoothed(values) -> list[float]:
    """An exponential moving average over about a tenth of the values, unbiased at the start."""
    keep = 1 - min(1.0, 10 / max(len(values), 1))
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight)
    return averages


def quieten(args) -> None:
    """Keep the log to what the user can act on, with each message once."""
    # Libraries warning each other about future renames.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"transformers|torch|accelerate"
    )
    if args.process_index > 0 or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
