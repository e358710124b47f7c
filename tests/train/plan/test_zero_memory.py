"""The plan counts what DeepSpeed takes for the trained parameters."""

import json
import os
import shlex

import pytest
import torch

from llama_lora.hardware.device import DTYPE_SWITCH
from llama_lora.train.plan.memory_plan import gradient_bytes, memory, optimizer_bytes
from llama_lora.train.plan.zero_memory import Zero
from llama_lora.train.preparation import bytes_to_come
from tests.conftest import ROOT, TRAIN, deepspeed, run_here, run_script, shipped
from tests.train.plan.test_memory_plan import setup

CONFIG = ROOT / "deepspeed-config.json"
LORA_7B = 39_976_960  # parameters: rank 16 on all linear layers

# Trains by the script, and tells how many bytes of torch's are held: as a step begins, before its
# gradients are handed to the engine, and at most while it reduces and applies them.
WATCHED = f"""
import runpy
from deepspeed.accelerator import get_accelerator
from llama_lora.train.memory.gradient_checkpointing import LiveBytes
from llama_lora.train.trainer import LoraTrainer

type(get_accelerator()).is_fp16_supported = lambda self: True
live, told = LiveBytes(), []
train, step = LoraTrainer.train, LoraTrainer.training_step


def watched_training(self, *args, **kwargs):
    self.accelerator.backward = watched(self.accelerator.backward)
    with live:
        result = train(self, *args, **kwargs)
    count = sum(parameter.numel() for parameter in self.gradients.parameters)
    if self.args.process_index == 0:
        print("held:", [count, *told[-1]], flush=True)
    return result


def watched_step(self, *args):
    told.append([live.bytes])
    return step(self, *args)


def watched(backward):
    def run(*args, **kwargs):
        told[-1].append(live.bytes)
        live.peak = live.bytes
        backward(*args, **kwargs)
        told[-1].append(live.peak)

    return run


LoraTrainer.train, LoraTrainer.training_step = watched_training, watched_step
runpy.run_path({str(ROOT / TRAIN)!r}, run_name="__main__")
"""
FLAGS = shlex.split("""
--quantization none --lora_r 256 --max_steps 2 --per_device_train_batch_size 1
--model_max_length 256 --save_strategy no
""")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "stage", "processes", "accumulation", "bucket"),
    [
        ("float16", 2, 1, 1, 2e7),  # with buckets of which one is larger than all matrices
        ("float16", 2, 2, 2, 65_536),
        ("float32", 2, 1, 1, 65_536),
        ("float16", 0, 1, 1, 2e7),
    ],
)
def test_deepspeed_takes_what_the_plan_counts(
    dtype, stage, processes, accumulation, bucket, tiny_base, tmp_path
):
    settings = json.loads(CONFIG.read_text())
    settings["zero_optimization"] |= {"stage": stage, "reduce_bucket_size": bucket}
    settings["fp16"]["initial_scale_power"] = 8
    driver, config, corpus = (tmp_path / name for name in ("watched.py", "ds.json", "split.json"))
    driver.write_text(WATCHED)
    config.write_text(json.dumps(settings))
    corpus.write_text(json.dumps(shipped("dummy_en.json")[:40]))
    own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", tmp_path / "o"]
    done = run_script(
        *(*deepspeed(processes), driver, "--deepspeed", config, *own, *FLAGS),
        *("--gradient_accumulation_steps", accumulation),
        env={**os.environ, DTYPE_SWITCH: dtype},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if "held:" in line)
    count, held, computed, most = json.loads(line.partition("held:")[2])

    itemsize = {"float16": 2, "float32": 4}[dtype]
    buckets = 2 * bucket if stage else 0
    zero = Zero(stage, itemsize, processes, buckets)
    kept = itemsize / processes if accumulation > 1 else 0  # of the micro-batches before
    masks = 4 * 256 * 8  # where those of two layers begin
    near = {"abs": 0.1 * count + masks}
    matrices = zero.matrices + optimizer_bytes("adamw_torch", zero)
    assert held == pytest.approx((matrices + kept) * count, **near)
    assert computed == pytest.approx((matrices + kept + 4) * count, **near)
    planned = (matrices + gradient_bytes(zero)) * count + zero.in_a_step(count)
    assert most <= planned + near["abs"]
    assert most >= 0.9 * planned


def test_the_plan_reads_deepspeeds_settings(parsed):
    """Ours, and DeepSpeed's own where nothing is set."""
    args = parsed("--deepspeed", CONFIG)[-1]
    assert Zero.of(args, 2, 2, 64) == Zero(2, 2, 2, 2 * 2e7)
    args = parsed("--deepspeed", '{"zero_optimization": {"stage": 1}}')[-1]
    assert Zero.of(args, 4, 1, 64) == Zero(1, 4, 1, 5e8)
    args = parsed("--deepspeed", '{"zero_optimization": {"stage": 0}}')[-1]
    assert Zero.of(args, 4, 1, 64) is None
    assert Zero.of(parsed()[-1], 2, 1, 64) is None
    auto = '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}'
    assert Zero.of(parsed("--deepspeed", auto)[-1], 2, 1, 64) == Zero(2, 2, 1, 64**2)


def test_two_cards_divide_the_optimizer_and_not_the_matrices():
    one, two = (memory(setup(zero=Zero(2, 2, n, 4e7)), 32) for n in (1, 2))
    assert one["LoRA matrices"] == two["LoRA matrices"] == 2 * LORA_7B
    assert (one["optimizer"], two["optimizer"]) == (12 * LORA_7B, 6 * LORA_7B)
    assert (one["gradients"], two["gradients"]) == (6 * LORA_7B, 5 * LORA_7B)
    trained = [("", torch.zeros(1))]
    assert bytes_to_come("adamw_torch", trained, Zero(2, 2, 1, 4e7)) == 6 + 8
    assert bytes_to_come("adamw_torch", trained, Zero(2, 2, 2, 4e7)) == 5 + 4


def test_buckets_count_where_they_are_more_than_the_activations_before_them():
    small, large = (Zero(2, 2, 1, elements) for elements in (4e7, 4e9))
    plain = memory(setup(), 32)
    assert memory(setup(zero=small), 32)["workspace"] == plain["workspace"]
    found = memory(setup(zero=large), 32)
    passing = sum(found[name] for name in ("activations", "loss", "workspace"))
    assert passing == pytest.approx(2 * 4e9)


def test_a_dry_run_says_what_deepspeed_takes(tiny_base, tmp_path):
    corpus = tmp_path / "split.json"
    corpus.write_text(json.dumps(shipped("dummy_en.json")[:20]))
    own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--deepspeed", CONFIG]
    done = run_here(TRAIN, *own, "--output_dir", tmp_path, "--dry_run", "True", "--plan_for", "T4")
    assert done.returncode == 0, done.stderr
    assert "M in 16 bits\n" in done.stdout
    assert "adamw_torch_fused, with the matrices in fp32" in done.stdout
