"""Run a training of this project and print where the time of its second step goes.

python3 -m benchmarks.training.profiled_training --model_name_or_path .demo/base \\
    --data_path split.json --output_dir .bench/profiled --max_steps 2
"""

import runpy
import sys

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, trainer

from benchmarks import operators
from benchmarks.pages import ROOT

SCRIPT = ROOT / "fastchat/train/train_lora.py"
STEP = 1  # counted from 0; the first one also sets things up
MARK = "operator\t"


class ProfiledStep(TrainerCallback):
    """Profiles one step and prints the operators that it spends most time in itself."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == STEP:
            card = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profile = profile(activities=[ProfilerActivity.CPU, *card])
            self.profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEP + 1:
            self.profile.stop()
            report(*operators.longest(self.profile))


def report(longest: list[tuple[str, int, float]], total: float) -> None:
    for name, calls, seconds in longest:
        print(f"{MARK}{name}\t{calls}\t{seconds:.3f}\t{seconds / total:.4f}")


if __name__ == "__main__":
    # The callbacks that every Trainer gets.
    trainer.DEFAULT_CALLBACKS.append(ProfiledStep)
    sys.argv[0] = str(SCRIPT)
    runpy.run_path(str(SCRIPT), run_name="__main__")
