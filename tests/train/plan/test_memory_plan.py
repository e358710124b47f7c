"""The memory plan: what it counts, what it refuses, and that what it suggests fits."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_lora.cli import InputError
from llama_lora.hardware.cards import CARDS
from llama_lora.model.folder.shape import NF4_BYTES, Shape, shape_of
from llama_lora.train.compute.attention_kernels import EFFICIENT, LOOP, VARLEN
from llama_lora.train.plan import forecast, suggestions, time_estimate
from llama_lora.train.plan.memory_plan import COMFORTABLE, CUDA_CONTEXT, GIB, Setup, memory, plan
from tests.conftest import README_FLAGS, TRAIN, error_line, run_here, shipped

LLAMA_7B = SimpleNamespace(
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    num_hidden_layers=32,
)
LLAMA_7B.to_dict = lambda: vars(LLAMA_7B)
SQUARE, WIDE = (4096, 4096), (11008, 4096)
LINEARS = {f"{name}_proj": SQUARE for name in "qkvo"}
LINEARS |= {"gate_proj": WIDE, "up_proj": WIDE, "down_proj": WIDE[::-1]}
NORMS = (2 * 32 + 1) * 4096
SEVEN = Shape(LLAMA_7B, LINEARS, 32, 2 * 32000 * 4096 + NORMS, 32000 * 4096)


def setup(**values) -> Setup:
    given = {
        "shape": SEVEN,
        "quantization": "8bit",
        "itemsize": 2,
        "targets": SEVEN.linears,
        "lora_r": 16,
        "lora_dropout": 0.05,
        "use_dora": False,
        "optim": "adamw_torch",
        "tokens": 2048,
        "longest": 512,
    }
    return Setup(**{**given, **values})


def test_the_published_number_of_parameters():
    assert SEVEN.parameters == 6_738_415_616  # Touvron et al. 2023: 6.7 B
    assert SEVEN.lora_parameters(SEVEN.targets(["q_proj", "v_proj"]), 8, False) == 4_194_304
    assert SEVEN.weight_bytes("none", 2) == 2 * SEVEN.parameters
    assert SEVEN.weight_bytes("4bit", 2) == SEVEN.linear * NF4_BYTES + 2 * SEVEN.other


def test_a_shape_is_what_transformers_builds(tiny_base):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    shape = shape_of(tiny_base)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.head == model.lm_head.weight.numel()
    assert shape.layers == model.config.num_hidden_layers


def test_a_folder_that_is_quantized_already():
    """Its scales may be in fp32: 4 bytes of 64 weights, instead of 1 and 4/256."""
    told = {"load_in_4bit": True, "bnb_4bit_use_double_quant": False}
    config = SimpleNamespace(**vars(LLAMA_7B), quantization_config=told)
    folder = replace(SEVEN, config=config)
    more = folder.weight_bytes("4bit", 2) - SEVEN.weight_bytes("4bit", 2)
    assert more == pytest.approx(SEVEN.linear * (3 - 4 / 256) / 64)
    offered = [[flags for flags, _ in suggestions.changes(setup(shape=s))] for s in (SEVEN, folder)]
    assert "--quantization 4bit" in offered[0]
    assert "--quantization 4bit" not in offered[1]


def test_an_unknown_target_is_named():
    with pytest.raises(
        InputError, match="w_pack: no such linear layer; expected all-linear or some"
    ):
        SEVEN.targets(["w_pack"])


def test_more_of_anything_takes_more():
    least = plan(setup(recompute="True"), 0).total
    for more in (
        {"tokens": 4096},
        {"lora_r": 64},
        {"quantization": "none"},
        {"itemsize": 4},
        {"recompute": "False"},
        {"use_dora": True},
    ):
        assert plan(setup(**{"recompute": "True", **more}), 0).total > least, more


def test_auto_recomputes_no_more_layers_than_needed():
    roomy = plan(setup(), 100 * GIB)
    assert roomy.recomputed == 0
    between = (roomy.total + plan(setup(recompute="True"), 0).total) / 2
    found = plan(setup(), between)
    assert 0 < found.recomputed < 32
    assert found.comfortable
    assert sum(memory(found.setup, found.recomputed - 1).values()) > COMFORTABLE * between


def test_the_log_sums_of_padded_examples_are_counted():
    """By the memory-efficient kernel, in every layer that does not recompute."""
    given = {"tokens": 4000, "attention": EFFICIENT}

    def activations(**more):
        return memory(setup(**given, **more), 0)["activations"]

    padded = activations(log_sums=10_000)
    assert padded - activations() == 32 * 4 * 32 * (10_000 - 4000)  # layers, bytes, heads, tokens
    assert activations(sum_rows=100_000) > activations() + 4 * 4096 * 50_000
    parts = [setup(**given, log_sums=10_000, parts=parts).attends.log_sums for parts in (1, 2, 99)]
    assert parts[0] == 2.5 > parts[1] > parts[2] == 1


@pytest.mark.parametrize(
    ("card", "kernel"), [("T4", EFFICIENT), ("P100", EFFICIENT), ("A100", VARLEN), ("CPU", LOOP)]
)
def test_the_kernel_is_that_of_the_card(card, kernel):
    dtype = getattr(torch, CARDS[card].dtype)
    assert forecast.kernel_of(SEVEN, dtype, CARDS[card].capability) == kernel


def test_only_windows_that_matter_decide_the_kernel():
    def on_a_p100(*more):
        return forecast.kernel_of(SEVEN, torch.float32, (6, 0), *more)

    assert on_a_p100((None, 512), 512) == EFFICIENT
    assert on_a_p100((None, 512), 513) == LOOP


def test_auto_computes_in_parts_before_layers_recompute():
    whole = setup(tokens=8192)
    room = plan(replace(whole, parts=4, recompute="False"), 0).total / COMFORTABLE
    found = forecast.choose(whole, room, {"parts"}, replace(SPEED, weights=1e12))
    assert found.fits
    assert found.recomputed == 0
    assert found.setup.parts == 4
    assert found.setup.part_tokens < whole.tokens


def test_auto_recomputes_where_dequantizing_anew_takes_longer():
    """By the reckoning of `Speed`: what a part of the least time gains and costs."""
    whole = setup(tokens=8192)
    room = plan(replace(whole, parts=4, recompute="False"), 0).total / COMFORTABLE
    plans = [plan(replace(whole, parts=parts), room) for parts in (1, 2, 4)]
    assert plans[0].recomputed > plans[1].recomputed > plans[2].recomputed == 0
    for weights in (1e12, 3e10, 1e10, 1e9):
        speed = replace(SPEED, rate=4e13, weights=weights)
        found = forecast.choose(whole, room, {"parts"}, speed)
        assert found == min(plans, key=speed.of_a_micro_batch)
    assert found.setup.parts == 1


def test_what_a_micro_batch_takes():
    """Operations at half of the rate, seven weights in each pass, and what kernels take besides."""
    asked = setup(quantization="8bit", recompute="True", parts=3, tokens=4096)
    speed = time_estimate.Speed(1e13, "a test", weights=1e9, launch=1e-5)
    work = time_estimate.EpochWork(4096, 0, 4096 * asked.longest)
    operations = time_estimate.operations(SEVEN, work, asked.lora_parameters, 1)
    kernels = 3 * 32 * time_estimate.LAUNCHES * 1.4
    expected = operations / 0.5e13 + 3 * 3 * SEVEN.linear / 1e9 + kernels * 1e-5
    assert speed.of_a_micro_batch(plan(asked, 100 * GIB)) == pytest.approx(expected)


def test_auto_ends_where_a_part_is_one_example():
    found = forecast.choose(setup(), 1 * GIB, {"parts"}, SPEED)
    assert not found.fits
    assert found.setup.part_tokens == 512


SPEED = time_estimate.Speed(1e12, "a test", 1e12)
setups = st.builds(
    setup,
    quantization=st.sampled_from(["8bit", "4bit", "none"]),
    itemsize=st.sampled_from([2, 4]),
    lora_r=st.sampled_from([4, 8, 64]),
    optim=st.sampled_from(["adamw_torch", "paged_adamw_8bit"]),
    longest=st.sampled_from([512, 2048, 8192, 40000]),
    tokens=st.sampled_from([40000, 80000]),
    recompute=st.sampled_from(["True", "False", "auto"]),
    parts=st.sampled_from([1, 2]),
    use_dora=st.booleans(),
    on_card=st.booleans(),
    attention=st.sampled_from([LOOP, VARLEN, EFFICIENT]),
    log_sums=st.sampled_from([0, 200_000]),
    sum_rows=st.sampled_from([0, 400_000]),
)


@given(setups, st.floats(1, 80))
def test_every_refusal_names_what_fits(asked, gib):
    available = gib * GIB
    if plan(asked, available).fits:
        return
    ways = suggestions.ways_to_fit(asked, available)
    assert all(found.fits and found.total <= available for _, found in ways)
    if not ways:
        assert suggestions.least(asked) > available
        assert "smaller base, or a card with more memory" in told(asked, available).verdict()
    else:
        assert ways[0][0] in told(asked, available).verdict()


def told(asked: Setup, available: float) -> forecast.Forecast:
    return forecast.Forecast(
        plan=plan(asked, available),
        where="T4",
        work=time_estimate.EpochWork(1000, 500, 500_000),
        examples=2,
        micro_batches=1,
        steps_per_epoch=1,
        steps=1,
        processes=1,
        speed=SPEED,
    )


def test_the_readmes_command_fits_a_t4_and_a_p100():
    for card in ("T4", "P100", "V100"):
        assert plan(setup(tokens=14 * 512, recompute="True"), CARDS[card].memory).fits


def test_operations_are_those_of_the_weights():
    work = time_estimate.EpochWork(tokens=1000, labelled=0, attended=0)
    assert time_estimate.operations(SEVEN, work, 0, 0) == 4 * SEVEN.linear * 1000
    assert time_estimate.operations(SEVEN, work, 0, 1) == 6 * SEVEN.linear * 1000
    labelled = time_estimate.EpochWork(tokens=0, labelled=10, attended=0)
    assert time_estimate.operations(SEVEN, labelled, 0, 0) == 4 * 32000 * 4096 * 10


def test_weights_are_dequantized_once_a_pass_and_part():
    asked = setup(quantization="8bit", recompute="True", parts=3, tokens=4096)
    once = replace(told(asked, 100 * GIB), speed=replace(SPEED, weights=1e9))
    assert once.dequantizing_hours == pytest.approx(3 * 3 * SEVEN.linear / 1e9 / 3600)
    without = replace(once, speed=replace(SPEED, weights=None))
    assert once.hours == pytest.approx(without.hours + once.dequantizing_hours)
    assert "dequantize" in once.table()
    assert "dequantize" not in without.table()


@pytest.mark.parametrize("quantization", ["8bit", "4bit", "none"])
def test_dequantizing_is_measured_here_and_bound_by_the_bandwidth_elsewhere(quantization):
    shape = replace(SEVEN, linears={"q_proj": (64, 64)})
    here = time_estimate.measured_dequantizing_rate(shape, quantization, torch.float32, "cpu")
    elsewhere = time_estimate.dequantizing_rate(300e9, quantization, 2)
    if quantization == "none":
        assert here is elsewhere is None
    else:
        assert here > 1e6
        assert elsewhere == {"8bit": 100e9, "4bit": 120e9}[quantization]


# ------------------------------------------------------------------ through the script


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(shipped("dummy_en.json")[:20]))
    return path


@pytest.fixture
def train(tiny_base, corpus, tmp_path):
    """Start a training of a base of which only the weights are missing."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))

    def run(*more):
        own = ["--model_name_or_path", folder, "--data_path", corpus, "--model_max_length", 256]
        return run_here(TRAIN, *own, "--output_dir", tmp_path / "out", *more)

    return run


def test_a_dry_run_needs_no_weights_and_no_card(train, tmp_path):
    done = train("--dry_run", "True", "--plan_for", "2xT4")
    assert done.returncode == 0, done.stderr
    where, rate = "on 2 × T4 (compute capability 7.5)", "of its published peak, assumed"
    for part in (where, rate, "weights", "optimizer"):
        assert part in done.stdout
    assert "20 examples" in done.stdout
    assert "fits, " in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("card", ["P100", "T4", "V100"])
def test_the_readmes_flags_plan_8_bits(card, train):
    done = train(*README_FLAGS, "--dry_run", "True", "--plan_for", card)
    assert done.returncode == 0, done.stderr
    assert f"8-bit base on {card} " in done.stdout
    assert " M in 8 bits, " in done.stdout
    assert "% of it to dequantize weights" in done.stdout


def test_a_dry_run_here_measures_the_rate(train):
    done = train("--dry_run", "True", "--per_device_train_batch_size", "auto")
    assert done.returncode == 0, done.stderr
    assert "measured now" in done.stdout


def test_a_card_that_is_none_is_one_line(train):
    done = train("--dry_run", "True", "--plan_for", "abacus")
    assert done.returncode == 1
    assert "abacus" in done.stderr
    assert "T4" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_plan_for_a_cpu_is_made_on_it(train):
    assert "expected a card" in error_line(train("--dry_run", "True", "--plan_for", "CPU"))


def test_a_training_that_cannot_fit_stops_before_weights_are_loaded(train, monkeypatch):
    monkeypatch.setattr(forecast, "room", lambda *_: (CUDA_CONTEXT + 1e6, CUDA_CONTEXT))
    done = train()
    assert done.returncode == 1
    assert "Nothing was loaded" in done.stderr
    done = train("--ignore_memory_plan", "True")
    assert done.returncode == 1
    assert "cannot be loaded" in done.stderr


def test_a_batch_in_the_parts_that_fit_trains_as_the_whole(
    tiny_base, corpus, tmp_path, monkeypatch
):
    own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--model_max_length", 256]
    own += ["--lora_dropout", 0, "--quantization", "none", "--gradient_checkpointing", "False"]

    def losses(name, batch):
        done = run_here(TRAIN, *own, "--output_dir", tmp_path / name, *batch)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "trainer_log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines], done.stdout

    monkeypatch.setattr(forecast, "room", lambda *_: (1e12, 0))
    whole, said = losses("whole", ["--per_device_train_batch_size", 4])
    found = json.loads((tmp_path / "whole" / "summary.json").read_text())["planned"]
    monkeypatch.setattr(forecast, "room", lambda *_: (found["memory_bytes"] / COMFORTABLE - 1, 0))
    monkeypatch.setattr(forecast, "ENOUGH_TOKENS", 0)
    parts, said = losses("parts", ["--per_device_train_batch_size", "auto"])
    assert "in 2 parts" in said
    assert parts == pytest.approx(whole, rel=1e-4)
