"""The scripts as people run them: a training that is killed and resumed, merged, and asked."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path

from gpu.process import ROOT, environment

TRAIN, MERGE = "fastchat/train/train_lora.py", "fastchat/model/merge_lora.py"
QUESTION, ANSWER = "Who are you?", "I am the one who was trained here."
STEPS, SAVED, KILLED = 80, 20, 25  # in all, between checkpoints, and where the kill comes
NEAR = 0.02  # between losses of the same step, of which some sums have another order
FLAGS = shlex.split(f"""
--num_train_epochs 1 --per_device_train_batch_size 1 --model_max_length 256 --packing False
--learning_rate 1e-2 --lora_r 16 --lora_dropout 0.05 --lora_target_modules all-linear
--logging_steps 1 --save_strategy steps --save_steps {SAVED} --resume_from_checkpoint auto
--report_to none --disable_tqdm True
""")


class Failed(Exception):
    """A script did not do what it should; says what it said last."""


class Scripts:
    """Runs them on a base, and keeps what they write in a folder."""

    def __init__(self, base: Path, runs: Path):
        self.base, self.runs = base, runs

    def killed_and_resumed(self) -> str:
        """The losses after a resume beside those of the run that nobody killed."""
        whole, killed = self.trained
        self._wait(self._train("killed"))
        expected, found = losses(whole), losses(killed)
        later = [step for step in expected if step > SAVED]
        if not set(later) <= found.keys():
            return f"WRONG: it ended at step {max(found)} of {STEPS}"
        error = max(abs(found[step] / expected[step] - 1) for step in later)
        right = "right" if error <= NEAR else "WRONG"
        return f"{right}: losses {error:.2%} apart at most in {len(later)} steps"

    def merged_and_asked(self) -> str:
        """The answers of base with adapter and of the merged model, both what was trained."""
        whole, _ = self.trained
        merged = self.runs / "merged"
        own = "--base_model", self.base, "--lora_weights", whole
        self._wait(self._start("merge", MERGE, *own, "--output_dir", merged, "--overwrite"))
        asked = [
            self._start(name, "generate.py", *model, "--prompt", QUESTION, "--temperature", "0")
            for name, model in (("adapter", own), ("merged model", ("--base_model", merged)))
        ]
        said = {process.name: self._wait(process).strip() for process in asked}
        wrong = [f"the {name} says {text[:60]!r}" for name, text in said.items() if text != ANSWER]
        return f"WRONG: {'; '.join(wrong)}" if wrong else f"right: both say {ANSWER!r}"

    @cached_property
    def trained(self) -> tuple[Path, Path]:
        """The folders of two equal trainings at the same time, of which one was killed."""
        shutil.rmtree(self.runs, ignore_errors=True)
        self.runs.mkdir(parents=True)
        (self.runs / "corpus.json").write_text(json.dumps([chat(i) for i in range(STEPS)]))
        whole, killed = self._train("whole"), self._train("killed")
        while killed.poll() is None and max(losses(self.runs / "killed"), default=0) < KILLED:
            time.sleep(0.02)
        killed.kill()
        if killed.wait() != -signal.SIGKILL:
            raise Failed(f"the training to be killed: {self._last_line('killed')}")
        self._wait(whole)
        return self.runs / "whole", self.runs / "killed"

    def _train(self, name: str) -> subprocess.Popen:
        own = "--model_name_or_path", self.base, "--data_path", self.runs / "corpus.json"
        return self._start(name, TRAIN, *own, "--output_dir", self.runs / name, *FLAGS)

    def _start(self, name: str, *command) -> subprocess.Popen:
        """A script, with its output in files of that name."""
        command = [sys.executable, *map(str, command)]
        told = self.runs / f"{name}.out", self.runs / f"{name}.err"
        with open(told[0], "w") as out, open(told[1], "w") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=environment())
        process.name = name
        return process

    def _wait(self, process: subprocess.Popen) -> str:
        """What it printed."""
        if process.wait():
            raise Failed(f"{process.name}: {self._last_line(process.name)}")
        return (self.runs / f"{process.name}.out").read_text()

    def _last_line(self, name: str) -> str:
        told = [(self.runs / f"{name}.{kind}").read_text().split("\n") for kind in ("out", "err")]
        return next((line for line in reversed([*told[0], *told[1]]) if line.strip()), "nothing")


def losses(run: Path) -> dict[int, float]:
    """The loss of each step, as far as a training has come."""
    path = run / "trainer_log.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["step"]: line["loss"] for line in found if "loss" in line}


def chat(number: int) -> dict:
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    return {"id": f"chat_{number}", "conversations": turns}
