"""The scripts as people run them: a training that is killed and resumed, merged, and asked."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

from benchmarks.gpu.reasons import last_line
from benchmarks.gpu.workers.process import ROOT, environment

TRAIN, MERGE = "fastchat/train/train_lora.py", "fastchat/model/merge_lora.py"
QUESTION, ANSWER = "Who are you?", "I am the one who was trained here."
STEPS, SAVED, KILLED = 80, 20, 25  # in all, between checkpoints, and where the kill comes
NEAR = 0.02  # nats, between losses of the same step, of which some sums have another order
FLAGS = shlex.split(f"""
--num_train_epochs 1 --per_device_train_batch_size 1 --model_max_length 256 --packing False
--learning_rate 3e-3 --lora_r 16 --lora_dropout 0.05 --lora_target_modules all-linear
--logging_steps 1 --save_strategy steps --save_steps {SAVED} --resume_from_checkpoint auto
--report_to none --disable_tqdm True
""")


class Failed(Exception):
    """A script did not do what it should; says what it said last."""


class Scripts:
    """Runs them on a base, and keeps what they write in a folder; ends what still runs at last."""

    def __init__(self, base: Path, runs: Path):
        self.base, self.runs, self.running = base, runs, []

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for process in self.running:
            process.kill()

    def start(self) -> None:
        """Two equal trainings at the same time, one of which is killed on its way."""
        shutil.rmtree(self.runs, ignore_errors=True)
        self.runs.mkdir(parents=True)
        (self.runs / "corpus.json").write_text(json.dumps([chat(i) for i in range(STEPS)]))
        self.whole, self.killed = self._train("whole"), self._train("killed")
        self.killer = Thread(target=kill_in_time, args=(self.killed, self.runs / "killed"))
        self.killer.start()

    def killed_and_resumed(self) -> str:
        """The losses after a resume beside those of the run that nobody killed."""
        self.killer.join()
        if self.killed.wait() != -signal.SIGKILL:
            raise Failed(f"it ended before it was killed: {self._last_line('killed')}")
        self._wait(self._train("killed"))
        self._wait(self.whole)
        expected, found = losses(self.runs / "whole"), losses(self.runs / "killed")
        later = [step for step in expected if step > SAVED]
        if not set(later) <= found.keys():
            return f"WRONG: it ended at step {max(found)} of {STEPS}"
        error = max(abs(found[step] - expected[step]) for step in later)
        right = "right" if error <= NEAR else "WRONG"
        return f"{right}: losses {error:.4f} apart at most in {len(later)} steps"

    def merged(self) -> tuple[Path, Path]:
        """The folders of the adapter, and of the model that merge_lora.py makes with it."""
        self._wait(self.whole)
        adapter, merged = self.runs / "whole", self.runs / "merged"
        own = "--base_model", self.base, "--lora_weights", adapter
        self._wait(self._start("merge", MERGE, *own, "--output_dir", merged))
        return adapter, merged

    def answer(self, model: Path) -> str:
        """What generate.py says."""
        asked = "--base_model", model, "--prompt", QUESTION, "--max_new_tokens", "16"
        return self._wait(self._start("answer", "generate.py", *asked)).strip()

    def _train(self, name: str) -> subprocess.Popen:
        own = "--model_name_or_path", self.base, "--data_path", self.runs / "corpus.json"
        return self._start(name, TRAIN, *own, "--output_dir", self.runs / name, *FLAGS)

    def _start(self, name: str, *command) -> subprocess.Popen:
        """A script, with its output in files of that name."""
        command = [sys.executable, *map(str, command)]
        told = self.runs / f"{name}.out", self.runs / f"{name}.err"
        with open(told[0], "w") as out, open(told[1], "w") as err:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=ROOT,
                env=environment(),
            )
        process.name = name
        self.running.append(process)
        return process

    def _wait(self, process: subprocess.Popen) -> str:
        """What it printed."""
        if process.wait():
            raise Failed(f"{process.name}: {self._last_line(process.name)}")
        return (self.runs / f"{process.name}.out").read_text()

    def _last_line(self, name: str) -> str:
        told = [self.runs / f"{name}.{kind}" for kind in ("out", "err")]
        return last_line("\n".join(path.read_text(errors="replace") for path in told))


def kill_in_time(process: subprocess.Popen, run: Path) -> None:
    """Kill a training between two of its checkpoints."""
    while process.poll() is None and max(losses(run), default=0) < KILLED:
        time.sleep(0.02)
    process.kill()


def losses(run: Path) -> dict[int, float]:
    """The loss of each step, as far as a training has come."""
    path = run / "trainer_log.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["step"]: line["loss"] for line in found if "loss" in line}


def chat(number: int) -> dict:
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    return {"id": f"chat_{number}", "conversations": turns}
