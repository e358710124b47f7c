"""Run a training of this project and print where the time of its second step goes.

python3 benchmarks/profiled_training.py --model_name_or_path .demo/base --data_path split.json \\
    --output_dir .bench/profiled --max_steps 2
"""

import runpy
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, trainer

SCRIPT = Path(__file__).parents[1] / "fastchat/train/train_lora.py"
STEP = 1  # counted from 0; the first one also sets things up
OPERATORS = 12
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
            report(self.profile.key_averages())


def report(operators) -> None:
    def own_time(operator) -> float:
        if torch.cuda.is_available():
            return operator.self_device_time_total
        return operator.self_cpu_time_total

    total = sum(map(own_time, operators))
    for operator in sorted(operators, key=own_time, reverse=True)[:OPERATORS]:
        share = own_time(operator) / total
        print(
            f"{MARK}{operator.key}\t{operator.count}\t{own_time(operator) / 1e6:.3f}\t{share:.4f}"
        )


if __name__ == "__main__":
    # The callbacks that every Trainer gets.
    trainer.DEFAULT_CALLBACKS.append(ProfiledStep)
    sys.argv[0] = str(SCRIPT)
    runpy.run_path(str(SCRIPT), run_name="__main__")
