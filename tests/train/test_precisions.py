"""From training to a merged model in every compute dtype and precision of the base, on any CPU."""

import json
import os
import shlex
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file

from llama_lora.chat.adapters import load
from llama_lora.hardware.cards import CARDS
from llama_lora.hardware.device import DTYPE_SWITCH, QUANTIZATIONS, compute_dtype, dtype_name
from llama_lora.model import adapter
from llama_lora.model.base import load_base
from llama_lora.model.template import load_tokenizer
from llama_lora.train.trainer import LoraTrainer
from tests.conftest import ROOT, TRAIN, deepspeed, run_here, run_script, shipped
from tests.train.adapted import same_adapter

# At a learning rate of 1e-2 some gradients overflow in fp16, on one CPU and not on another.
FLAGS = shlex.split("""
--num_train_epochs 2 --per_device_train_batch_size 2 --learning_rate 3e-3 --lora_r 4
--lora_dropout 0.1 --model_max_length 256 --logging_steps 1 --eval_ratio 0.2
--eval_strategy steps --eval_steps 4 --save_strategy no
""")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("avx512_bf16")
FAST = {(torch.float32, "none"), (torch.bfloat16, "4bit"), (torch.float16, "8bit")}
ALL = [
    pytest.param(
        *(dtype, bits),
        marks=[] if (dtype, bits) in FAST else pytest.mark.slow,
        id=f"{dtype_name(dtype)}-{bits}",
    )
    for dtype in DTYPES
    for bits in QUANTIZATIONS
    if bits != "auto"
]


def ran(script, *flags) -> str:
    """What a script printed."""
    done = run_here(script, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def close(found, expected, dtype) -> bool:
    """Whether numbers are those of fp32 but for the rounding of `dtype`, some layers deep."""
    found, expected = torch.as_tensor(found).float(), torch.as_tensor(expected).float()
    return bool((found - expected).norm() <= 16 * torch.finfo(dtype).eps * expected.norm())


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Along a given text."""
    return model.eval()(torch.arange(3, 200)[None]).logits[0].float()


@pytest.mark.parametrize(("dtype", "bits"), ALL)
def test_train_stop_resume_evaluate_generate_merge(dtype, bits, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv(DTYPE_SWITCH, dtype_name(dtype))
    corpus, whole, cut = tmp_path / "split.json", tmp_path / "whole", tmp_path / "cut"
    corpus.write_text(json.dumps(shipped("dummy_en.json")[:40]))
    base = ["--base_model", tiny_base]

    own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--quantization", bits]
    train = TRAIN, *own, *FLAGS, "--output_dir"
    ran(*train, whole)
    assert "stopped by --max_hours" in ran(*train, cut, "--max_hours", "1e-6")
    assert (cut / "checkpoint-1" / "scaler.pt").exists() == (dtype == torch.float16)
    ran(*train, cut, "--resume_from_checkpoint", "True")
    assert same_adapter(whole, cut)
    trained = json.loads((whole / "summary.json").read_text())
    assert trained["compute_dtype"] == dtype_name(dtype)
    assert trained["held_out_loss_after"] < trained["held_out_loss_before"] - 0.1

    adapted = [*base, "--lora_weights", whole, "--quantization", bits]
    measured = "--data_path", corpus, "--eval_ratio", "0.2", "--max_length", "256"
    ran("fastchat/eval/evaluate.py", *adapted, *measured)
    found = json.loads((whole / "evaluation.json").read_text())["held_out"]["loss"]
    for side, when in (("base", "before"), ("adapter", "after")):
        # The same arithmetic, whatever the dtype: only what shares a pass differs.
        assert found[side]["value"] == pytest.approx(trained[f"held_out_loss_{when}"], rel=1e-3)

    ask = "--prompt", "Who are you?", "--temperature", "0", "--max_new_tokens", "8"
    answer = ran("generate.py", *adapted, *ask)
    model = load(tiny_base, whole, bits)[0]
    assert next(model.parameters()).dtype == dtype
    monkeypatch.setenv(DTYPE_SWITCH, "float32")
    in_fp32 = load(tiny_base, whole, bits)[0]
    assert close(logits(model), logits(in_fp32), dtype)

    merged = tmp_path / "merged"
    merge = "fastchat/model/merge_lora.py", *base, "--lora_weights", whole, "--output_dir", merged
    ran(*merge, "--dtype", "float32")
    unquantized = load(tiny_base, whole)[0]
    assert close(logits(load_base(merged)), logits(unquantized), torch.float32)
    if dtype == torch.float32 and bits == "none":
        assert ran("generate.py", "--base_model", merged, *ask) == answer


FP16_EVERYWHERE = f"""
import runpy
from deepspeed.accelerator import get_accelerator
type(get_accelerator()).is_fp16_supported = lambda self: True
runpy.run_path({str(ROOT / TRAIN)!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_sixteen_bits_under_deepspeed_train_as_fp32(tiny_base, tmp_path):
    """Two processes, ZeRO-2 and its loss scale; also where DeepSpeed takes no fp16 by itself."""
    driver, corpus = tmp_path / "driver.py", tmp_path / "split.json"
    driver.write_text(FP16_EVERYWHERE)
    corpus.write_text(json.dumps(shipped("dummy_en.json")[:40]))
    found = {}
    for dtype in DTYPES:
        output = tmp_path / dtype_name(dtype)
        own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", output]
        more = ["--lora_dropout", "0", "--deepspeed", "./deepspeed-config.json"]
        done = run_script(
            *deepspeed(2),
            *(driver, *own, *FLAGS, *more),
            env={**os.environ, DTYPE_SWITCH: dtype_name(dtype)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (output / "trainer_log.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        found[dtype] = [line["eval_loss"] for line in log if "eval_loss" in line]
    falls = {dtype: losses[0] - losses[-1] for dtype, losses in found.items()}
    assert falls[torch.float32] > 0.1
    for dtype in DTYPES:
        assert falls[dtype] == pytest.approx(falls[torch.float32], rel=0.01)


STEPS = 12
TWELVE = shlex.split(f"""
--max_steps {STEPS} --per_device_train_batch_size 2 --learning_rate 3e-3 --lora_r 4
--model_max_length 256 --quantization none --save_strategy no
""")
TOO_LARGE = 24  # power of two: a loss scale at which the gradients of the first steps overflow
GradScaler = torch.amp.GradScaler


@pytest.fixture(scope="module")
def twelve_steps(tiny_base, tmp_path_factory) -> list:
    corpus = tmp_path_factory.mktemp("corpus") / "split.json"
    corpus.write_text(json.dumps(shipped("dummy_en.json")[:40]))
    return ["--model_name_or_path", tiny_base, "--data_path", corpus, *TWELVE, "--output_dir"]


@pytest.fixture(scope="module")
def rates_in_fp32(twelve_steps, tmp_path_factory) -> list[float]:
    """The rate of each step of a run in which none is skipped."""
    folder = tmp_path_factory.mktemp("fp32")
    assert run_here(TRAIN, *twelve_steps, folder).returncode == 0
    rates, skipped = logged(folder)
    assert not any(skipped)
    assert rates[-1] < 0.03 * max(rates)
    return rates


def logged(folder: Path) -> tuple[list[float], list[bool]]:
    """The learning rate of each step, and whether its gradients overflowed."""
    lines = (folder / "trainer_log.jsonl").read_text().splitlines()
    steps = [entry for entry in map(json.loads, lines) if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
    overflowed = [not torch.tensor(entry["grad_norm"]).isfinite().item() for entry in steps]
    return [entry["learning_rate"] for entry in steps], overflowed


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_the_rate_is_that_of_the_step(optim, twelve_steps, rates_in_fp32, tmp_path, monkeypatch):
    """Resumed after a step that was skipped, too."""
    monkeypatch.setenv(DTYPE_SWITCH, "float16")
    monkeypatch.setattr(torch.amp, "GradScaler", partial(GradScaler, init_scale=2.0**TOO_LARGE))
    for more in (["--max_hours", "1e-6"], ["--resume_from_checkpoint", "True"]):
        done = run_here(TRAIN, *twelve_steps, tmp_path, "--optim", optim, *more)
        assert done.returncode == 0, done.stderr
    rates, skipped = logged(tmp_path)
    assert skipped[:3] == [True] * 3
    assert not skipped[-1]
    assert rates == pytest.approx(rates_in_fp32, rel=1e-12)


@pytest.mark.slow
def test_the_rate_is_that_of_the_step_under_deepspeed(twelve_steps, rates_in_fp32, tmp_path):
    driver, config = tmp_path / "driver.py", tmp_path / "config.json"
    driver.write_text(FP16_EVERYWHERE)
    settings = json.loads((ROOT / "deepspeed-config.json").read_text())
    settings["fp16"] |= {"initial_scale_power": TOO_LARGE, "hysteresis": 1}
    config.write_text(json.dumps(settings))
    train = [*deepspeed(1), driver, "--deepspeed", config, *twelve_steps, tmp_path / "output"]
    in_fp16 = os.environ | {DTYPE_SWITCH: "float16"}
    for more in (["--max_hours", "1e-6"], ["--resume_from_checkpoint", "True"]):
        done = run_script(*train, *more, env=in_fp16)
        assert done.returncode == 0, done.stderr[-3000:]
    rates, skipped = logged(tmp_path / "output")
    assert skipped[:3] == [True] * 3
    assert not skipped[-1]
    assert rates == pytest.approx(rates_in_fp32, rel=1e-12)


def test_deepspeed_without_zero_scales_no_loss_in_fp32():
    """Its engine then has the optimizer itself, which knows of no scale."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    engine = SimpleNamespace(optimizer=optimizer)
    trainer = SimpleNamespace(is_deepspeed_enabled=True, model_wrapped=engine)
    assert LoraTrainer._loss_scale(trainer) == 1


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_an_adapter_is_trained_over_the_weights_that_quantizing_keeps(bits, tiny_base, tmp_path):
    """The oracle is a training over these, unquantized, in a base of their own."""
    corpus, kept = tmp_path / "split.json", tmp_path / "kept"
    corpus.write_text(json.dumps(shipped("dummy_en.json")[:40]))
    base = load_base(tiny_base, "none")
    with torch.no_grad():
        for name, module in load_base(tiny_base, bits).named_modules():
            if isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
                base.get_submodule(name).weight.copy_(dequantize_module_weight(module))
    base.save_pretrained(kept)
    load_tokenizer(tiny_base).save_pretrained(kept)
    found = []
    for folder, quantization in ((tiny_base, bits), (kept, "none")):
        output = tmp_path / quantization
        own = ["--model_name_or_path", folder, "--data_path", corpus, "--output_dir", output]
        ran(TRAIN, *own, *FLAGS, "--quantization", quantization)
        weights = load_file(output / adapter.WEIGHTS)
        found.append(torch.cat([weights[name].flatten() for name in sorted(weights)]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.9999


@pytest.mark.parametrize(
    ("bf16", "amx", "dtype"),
    [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ],
)
def test_a_cpu_computes_in_bf16_where_it_has_instructions(bf16, amx, dtype, monkeypatch):
    monkeypatch.delenv(DTYPE_SWITCH)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert compute_dtype(CARDS["CPU"]) == dtype
    for chosen in DTYPES:
        monkeypatch.setenv(DTYPE_SWITCH, dtype_name(chosen))
        assert compute_dtype() == chosen


@pytest.mark.parametrize("script", ["fastchat/train/check_machine.py", TRAIN])
def test_an_unknown_dtype_is_one_line(script, monkeypatch):
    monkeypatch.setenv(DTYPE_SWITCH, "bf16")
    own = ["--model_name_or_path", "b", "--data_path", "d", "--output_dir", "o"]
    done = run_here(script, *own) if script == TRAIN else run_script(script)
    assert done.returncode == 1
    assert "LLAMA_LORA_DTYPE=bf16: expected float32, bfloat16 or float16" in done.stderr
    assert "Traceback" not in done.stderr
