"""What a run of days has to survive: kills, signals, limits, full disks, losses that are no number.

Most of it runs the script's own `main` in this process, which spares each run the imports; what
needs a process of its own (a kill, a launcher, a limit of the shell) gets one.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_lora.train.checkpoints import is_complete
from llama_lora.train.compute import chunked_loss
from tests.conftest import ROOT, TRAIN, deepspeed, run_here, shipped
from tests.train.adapted import same_adapter

FLAGS = shlex.split("""
--num_train_epochs 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 2
--learning_rate 2e-3 --lora_dropout 0.1 --model_max_length 256 --logging_steps 1
--save_strategy steps --save_steps 1
""")
STEPS = 15


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "split.json"
    path.write_text(json.dumps(shipped("dummy_en.json")[:40]))
    return path


@pytest.fixture
def train(tiny_base, corpus):
    """Train into a folder: the exit code, and what went to stdout and stderr."""

    def run(output, *more):
        own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", output]
        done = run_here(TRAIN, *own, *FLAGS, *more)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def uninterrupted(tiny_base, corpus, tmp_path_factory) -> Path:
    """The adapter of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", folder]
    done = run_here(TRAIN, *own, *FLAGS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def one_step(tiny_base, corpus, tmp_path_factory) -> Path:
    """What a run left that --max_hours stopped after its first step."""
    folder = tmp_path_factory.mktemp("stopped")
    own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", folder]
    done = run_here(TRAIN, *own, *FLAGS, "--max_hours", "1e-6")
    assert done.returncode == 0, done.stderr
    assert "stopped by --max_hours 1e-06 after step 1 of" in done.stdout
    return folder


@pytest.fixture
def stopped(one_step, tmp_path) -> Path:
    """A copy of that, to go on from."""
    return shutil.copytree(one_step, tmp_path / "stopped")


def log_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]


def after_step(output: Path, step: int, number: signal.Signals):
    """Send this process `number` when `step` is logged."""

    def wait():
        log = output / "trainer_log.jsonl"
        while not log.is_file() or log.read_text().count("\n") < step:
            if done.wait(0.005):
                return
        os.kill(os.getpid(), number)

    done = threading.Event()
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return done


@pytest.mark.parametrize(("number", "step"), [("SIGTERM", 2), ("SIGINT", 6), ("SIGUSR1", 11)])
def test_a_signal_saves_and_the_resumed_run_ends_in_the_same_bits(
    number, step, train, uninterrupted, tmp_path
):
    done = after_step(tmp_path, step, signal.Signals[number])
    code, out, _ = train(tmp_path, "--save_strategy", "no")
    done.set()
    assert code == 0
    assert f"stopped by {number} after step" in out
    assert out.splitlines()[-1].endswith("--resume_from_checkpoint True")
    assert not (tmp_path / "adapter_model.safetensors").exists()
    code, out, err = train(tmp_path, "--resume_from_checkpoint", "True")
    assert code == 0, err
    assert "the adapter is complete" in out
    assert same_adapter(tmp_path, uninterrupted)
    logged = log_of(tmp_path)
    assert [entry["step"] for entry in logged] == list(range(1, STEPS + 1))


def test_max_hours_ends_in_time_and_resumes_to_the_same_bits(train, uninterrupted, stopped):
    code, _, err = train(stopped, "--resume_from_checkpoint", "auto")
    assert code == 0, err
    assert same_adapter(stopped, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "deepspeed"])
def test_kills_at_random_steps_change_no_bit(launcher, tiny_base, corpus, tmp_path):
    """Plain, and under ZeRO-2 with two processes; killed at any moment, three times in a row."""
    import random

    start = {"python": [sys.executable, TRAIN]}
    start["deepspeed"] = [TRAIN, "--deepspeed", "./deepspeed-config.json"]

    def begin(output):
        head = start[launcher] if launcher == "python" else [*deepspeed(2), *start[launcher]]
        own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", output]
        command = [*head, *own, *FLAGS, "--resume_from_checkpoint", "auto"]
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    assert begin(tmp_path / "whole").wait(300) == 0
    killed, rng = tmp_path / "killed", random.Random(0)
    for _ in range(3):
        process, target = begin(killed), rng.randint(1, 6)
        log = killed / "trainer_log.jsonl"
        before = log.read_text().count("\n") if log.is_file() else 0
        while process.poll() is None:
            if log.is_file() and log.read_text().count("\n") >= before + target:
                break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert begin(killed).wait(300) == 0
    assert same_adapter(tmp_path / "whole", killed)


def test_a_loss_that_is_no_number_says_where_and_keeps_the_state_before(train, corpus, tmp_path):
    code, _, err = train(tmp_path, "--learning_rate", "1e30", "--save_steps", "1000")
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    # At step 1 the learning rate is still 0; step 2 throws the matrices far out.
    assert re.search("step 3: (the loss is (nan|inf)|a gradient is nan)", line), line
    assert any(item["id"] in line for item in json.loads(corpus.read_text()))
    assert f"{tmp_path}/checkpoint-2" in line
    assert is_complete(tmp_path / "checkpoint-2")


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stands(
    train, tiny_base, corpus, tmp_path
):
    wide = ["--lora_r", "64"]
    assert train(tmp_path, *wide, "--max_hours", "1e-6")[0] == 0
    own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", tmp_path]
    words = [sys.executable, TRAIN, *own, *FLAGS, *wide, "--resume_from_checkpoint", "True"]
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 100; exec {shlex.join(map(str, words))}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path}/checkpoint-2: cannot be written" in line
    assert f"the last good checkpoint is {tmp_path}/checkpoint-1" in line
    assert "Traceback" not in done.stderr
    assert is_complete(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-2").exists()


def test_resuming_with_other_settings_names_them(train, stopped):
    other = ["--per_device_train_batch_size", "1", "--lora_r", "4", "--seed", "7"]
    code, _, err = train(stopped, *other, "--resume_from_checkpoint", "True")
    assert code == 1
    assert "--per_device_train_batch_size 1 (was 2)" in err
    assert "--seed 7 (was 42)" in err
    assert "--lora_r 4 (was 16)" in err


def test_resuming_further_back_takes_the_abandoned_branch_away(train, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    again = ["--resume_from_checkpoint", tmp_path / "checkpoint-4", "--save_total_limit", "2"]
    code, out, err = train(tmp_path, *again)
    assert code == 0, err
    assert "checkpoint-5, checkpoint-6, " in out
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
    assert same_adapter(tmp_path, uninterrupted)


def test_another_learning_rate_on_resuming_is_obeyed(train, stopped):
    code, out, _ = train(stopped, "--resume_from_checkpoint", "True", "--learning_rate", "1e-3")
    assert code == 0
    assert "learning rate 0.001 instead of 0.002" in out
    rates = [entry["learning_rate"] for entry in log_of(stopped)]
    assert max(rates[1:]) == pytest.approx(1e-3)


def test_a_finished_run_that_is_started_again_stays_as_it_is(train, tmp_path):
    evals = ["--eval_ratio", "0.2", "--eval_strategy", "steps", "--eval_steps", "1"]
    rising = ["--learning_rate", "0.05", "--lr_scheduler_type", "constant"]
    more = [*evals, *rising, "--resume_from_checkpoint", "auto"]
    assert train(tmp_path, *more)[0] == 0
    before = load_file(tmp_path / "adapter_model.safetensors")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best_step"] < summary["steps"]
    code, _, err = train(tmp_path, *more)
    assert code == 0, err
    after = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(after[name], matrix) for name, matrix in before.items())


def test_early_stopping_keeps_the_best_adapter(train, tmp_path):
    """At this rate the held-out loss soon rises; the adapter saved is the one before it did."""
    evals = ["--eval_ratio", "0.2", "--eval_strategy", "steps", "--eval_steps", "1"]
    patience = ["--early_stopping_patience", "2", "--learning_rate", "1.0"]
    code, out, err = train(tmp_path, *evals, *patience, "--num_train_epochs", "30")
    assert code == 0, err
    summary = json.loads((tmp_path / "summary.json").read_text())
    logged = log_of(tmp_path)
    losses = {e["step"]: e["eval_loss"] for e in logged if "eval_loss" in e and e["step"]}
    assert summary["best_step"] == min(losses, key=losses.get) < summary["steps"]
    assert summary["steps"] == summary["best_step"] + 2
    assert summary["held_out_loss_after"] == min(losses.values())
    best = load_file(tmp_path / f"checkpoint-{summary['best_step']}/adapter_model.safetensors")
    assert all(
        torch.equal(best[name], matrix)
        for name, matrix in load_file(tmp_path / "adapter_model.safetensors").items()
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_dora", "True", "--quantization", "4bit"],
        ["--use_rslora", "True"],
        ["--neftune_noise_alpha", "5"],
        ["--loraplus_lr_ratio", "16"],
        ["--gradient_checkpointing", "True", "--packing", "False"],
        ["--quantization", "4bit"],
    ],
)
def test_every_kind_of_training_ends_in_a_verified_adapter(flags, train, uninterrupted, tmp_path):
    code, out, err = train(tmp_path, *flags, "--num_train_epochs", "1", "--save_strategy", "no")
    assert code == 0, err
    assert "the adapter is complete and verified" in out
    assert not same_adapter(tmp_path, uninterrupted)


def test_checkpointed_layers_change_no_result(train, uninterrupted, tmp_path):
    code, out, err = train(tmp_path, "--gradient_checkpointing", "True", "--save_strategy", "no")
    assert code == 0, err
    assert "gradient checkpointing in 2 of 2 layers" in out
    assert same_adapter(tmp_path, uninterrupted)


SMALL_CARD = '''
"""train_lora.py on a card that is too small for more than some tokens at a time, simulated."""

import runpy
import sys

import torch

from llama_lora.train.compute import packed_attention

MOST = {most}
attend = packed_attention.attend_within_examples


class Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, tokens):
        ctx.tokens = tokens
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        if ctx.tokens > MOST:
            raise torch.OutOfMemoryError("no memory left on this simulated card")
        return upstream, None


def on_a_small_card(module, query, *args, **kwargs):
    result, weights = attend(module, query, *args, **kwargs)
    return Full.apply(result, query.shape[2]), weights


packed_attention.AttentionInterface.register(packed_attention.BY_EXAMPLE, on_a_small_card)
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
'''


def test_held_out_batches_that_do_not_fit_are_measured_in_parts(train, tmp_path, monkeypatch):
    flags = "--max_steps", "2", "--eval_ratio", "0.3", "--save_strategy", "no"
    assert train(tmp_path / "roomy", *flags)[0] == 0
    computed = chunked_loss.summed_loss

    def on_a_small_card(model, hidden, *labels):
        if len(hidden) > 220 and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no memory left on this simulated card")
        return computed(model, hidden, *labels)

    monkeypatch.setattr(chunked_loss, "summed_loss", on_a_small_card)
    code, out, err = train(tmp_path / "small", *flags)
    assert code == 0, err
    said = "out of memory: from now on, every held-out micro-batch is computed in 2 parts"
    assert out.count(said) == 1
    roomy, small = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("roomy", "small")
    )
    for when in ("before", "after"):
        measured = roomy[f"held_out_loss_{when}"]
        assert small[f"held_out_loss_{when}"] == pytest.approx(measured, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "deepspeed"])
def test_a_card_that_is_too_small_trains_the_same_in_parts(launcher, tiny_base, corpus, tmp_path):
    """The backward pass of the last layer succeeds, that of the first breaks off."""
    small = tmp_path / "small_card.py"
    small.write_text(SMALL_CARD.format(most=220, script=str(ROOT / TRAIN)))
    folders = []
    for script in (ROOT / TRAIN, small):
        folder = tmp_path / f"{script.stem}-out"
        folders.append(folder)
        head = {"python": [sys.executable, script]}
        head["deepspeed"] = [*deepspeed(2), script, "--deepspeed", "./deepspeed-config.json"]
        own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", folder]
        command = [*head[launcher], *own, *FLAGS, "--lora_dropout", "0", "--quantization", "none"]
        done = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert "the effective batch stays the same" in done.stdout
    whole, parts = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    for name, matrix in whole.items():
        assert torch.allclose(matrix, parts[name], atol=1e-4), name
