"""Training through the script, under every launcher, on a tiny Llama."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llama_lora.cli import InputError
from llama_lora.hardware.device import DTYPE_SWITCH
from llama_lora.model import adapter
from llama_lora.model.folder import base_fingerprint
from llama_lora.train.checkpoints import check_engine, clear, finish, is_complete, starting_point
from tests.conftest import (
    README_CORPUS,
    README_FLAGS,
    ROOT,
    TRAIN,
    deepspeed,
    run_here,
    run_script,
    shipped,
)

ADAPTER_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "loss.png",
    "summary.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_log.jsonl",
    "trainer_state.json",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "split.json"
    path.write_text(json.dumps(shipped("dummy_en.json")[:README_CORPUS]))
    return path


def command(launcher, base, corpus, output, *more):
    start = {
        "python": [sys.executable, TRAIN],
        "deepspeed": [*deepspeed(2), TRAIN, "--deepspeed", "./deepspeed-config.json"],
    }[launcher]
    return [str(part) for part in (*start, *flags(base, corpus, output), *more)]


def flags(base, corpus, output) -> list:
    return [
        "--model_name_or_path",
        base,
        "--data_path",
        corpus,
        "--output_dir",
        output,
        *README_FLAGS,
    ]


def train(launcher, *args):
    """Train by that launcher; plain python in this process."""
    words = command(launcher, *args)
    return run_here(*words[1:]) if launcher == "python" else run_script(*words)


def loads_with_peft_alone(base: Path, folder: Path) -> bool:
    """Whether transformers and peft alone put the adapter on its base, and it changes answers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(ids).logits
        after = PeftModel.from_pretrained(model, folder)(ids).logits
    return bool(torch.isfinite(after).all()) and not torch.allclose(before, after)


def base_named(folder: Path) -> str:
    return json.loads((folder / adapter.CONFIG).read_text())["base_model_name_or_path"]


@pytest.mark.parametrize(("launcher", "processes"), [("python", 1), ("deepspeed", 2)])
def test_the_readmes_command(launcher, processes, tiny_base, readme_corpus, tmp_path, request):
    """In the dtype that users of this machine get."""
    if launcher == "deepspeed":
        done, output = request.getfixturevalue("launched")
    else:
        own = {name: value for name, value in os.environ.items() if name != DTYPE_SWITCH}
        output = tmp_path
        words = command(launcher, tiny_base, readme_corpus, output, "--eval_ratio", "0.125")
        done = run_script(*words, env=own)
    assert done.returncode == 0, done.stderr[-3000:]
    if port := re.search(r"master_port=(\d+)", " ".join(done.args)):
        assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port[1]}_*"))

    examples, batches = re.search(
        r"^(\d+) examples in (\d+) micro-batches of 4 × 256 tokens", done.stdout, re.M
    ).groups()
    assert int(examples) == README_CORPUS - README_CORPUS // 8
    steps = math.ceil(int(batches) / processes)
    logged = re.findall(rf"^step +(\d+)/{steps} \| epoch \S+ \| loss \d", done.stdout, re.M)
    assert logged == [str(step + 1) for step in range(steps)]
    assert done.stdout.count("held-out loss") == 2
    if not torch.cuda.is_available():
        assert done.stdout.count("--fp16 True: not on CPU") == 1

    written = {path.name for path in output.iterdir()}
    checkpoints = {name for name in written if name.startswith("checkpoint-")}
    assert checkpoints == {f"checkpoint-{step}" for step in {*range(2, steps + 1, 2), steps}}
    assert written - checkpoints == ADAPTER_FILES | {"best_adapter"}
    for folder in (".", *checkpoints):
        files = [output / folder / name for name in (adapter.CONFIG, adapter.WEIGHTS)]
        assert len({path.stat().st_mode for path in files}) == 1, folder  # both as the umask says
        assert base_fingerprint.same(output / folder / adapter.WEIGHTS, tiny_base), folder
        assert base_named(output / folder) == str(tiny_base)
    summary = json.loads((output / "summary.json").read_text())
    # A of rank 8 × in and B of out × 8, in each of 2 layers, for q, k, v, o, gate, up and down.
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert summary["trainable_parameters"] == 2 * sum(8 * (a + b) for a, b in shapes)
    assert summary["quantization"] == "8bit"
    assert summary["processes"] == processes
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    assert loads_with_peft_alone(tiny_base, output)


@pytest.mark.slow
def test_labelled_tokens_are_counted_over_all_processes(tiny_base, corpus, tmp_path):
    alone = train("python", tiny_base, corpus, tmp_path / "one", "--packing", "False")
    both = train("deepspeed", tiny_base, corpus, tmp_path / "two", "--packing", "False")
    assert (alone.returncode, both.returncode) == (0, 0), both.stderr[-3000:]
    counts = [
        json.loads((tmp_path / name / "summary.json").read_text())["labelled_tokens"]
        for name in ("one", "two")
    ]
    audited = int(re.search(r"([\d,]+) labelled", alone.stdout)[1].replace(",", ""))
    assert counts == [audited, audited]


@pytest.mark.slow
def test_two_processes_step_as_one_with_twice_the_accumulation(tiny_base, corpus, tmp_path):
    """Adam would hide a gradient that is off by a factor; its norm does not."""
    same = ["--lora_dropout", "0", "--quantization", "none", "--warmup_ratio", "0"]
    one = [*same, "--gradient_accumulation_steps", "2"]
    assert train("python", tiny_base, corpus, tmp_path / "one", *one).returncode == 0
    assert train("deepspeed", tiny_base, corpus, tmp_path / "two", *same).returncode == 0
    logs = [
        [json.loads(line) for line in (tmp_path / name / "trainer_log.jsonl").open()]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1]) > 1
    for alone, both in zip(*logs, strict=True):
        assert both["labelled_tokens"] == alone["labelled_tokens"]
        assert both["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        assert both["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("launcher", ["python", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_kill_and_resume(launcher, tiny_base, corpus, tmp_path):
    more = ["--num_train_epochs", "8", "--packing", "False", "--base_name", "someone/llama"]
    running = subprocess.Popen(
        command(launcher, tiny_base, corpus, tmp_path, *more),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not is_complete(tmp_path / "checkpoint-4") and time.monotonic() < deadline:
        assert running.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "adapter_model.safetensors").exists()

    unasked = train(launcher, tiny_base, corpus, tmp_path, *more)
    assert_one_line(unasked, "--resume_from_checkpoint True")
    other = train(
        launcher, tiny_base, corpus, tmp_path, "--lora_r", "4", "--resume_from_checkpoint", "True"
    )
    assert_one_line(other, "--lora_r 4")
    if launcher == "deepspeed":
        again = *more, "--resume_from_checkpoint", "True"
        elsewhere = train("python", tiny_base, corpus, tmp_path, *again)
        assert_one_line(elsewhere, "was written under deepspeed")

    resumed = train(
        launcher, tiny_base, corpus, tmp_path, *more, "--resume_from_checkpoint", "True"
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    first = int(re.search(r"^step +(\d+)/", resumed.stdout, re.M)[1])
    assert first >= 5
    audited = int(re.search(r"([\d,]+) labelled", resumed.stdout)[1].replace(",", ""))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["labelled_tokens"] == 8 * audited  # of all epochs, also those before the kill

    finished = train(launcher, tiny_base, corpus, tmp_path, *more)
    assert_one_line(finished, "--overwrite_output_dir True")
    for folder in (tmp_path, *tmp_path.glob("checkpoint-*")):
        assert base_named(folder) == "someone/llama"
        assert base_fingerprint.same(folder / adapter.WEIGHTS, tiny_base)
    assert loads_with_peft_alone(tiny_base, tmp_path)


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in (adapter.WEIGHTS, "trainer_state.json"):
            (folder / name).touch()
    finish(tmp_path / "checkpoint-2", {}, limit=None)
    assert starting_point(str(tmp_path), "True", False) == str(tmp_path / "checkpoint-2")
    assert starting_point(str(tmp_path), "auto", False) == str(tmp_path / "checkpoint-2")
    with pytest.raises(InputError, match="--overwrite_output_dir True"):
        starting_point(str(tmp_path), None, False)
    assert starting_point(str(tmp_path), None, True) is None
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(InputError, match="no complete checkpoint"):
        starting_point(str(tmp_path), "True", False)
    assert starting_point(str(tmp_path), "auto", False) is None


def test_an_engine_does_not_go_on_without_the_others_states(tmp_path):
    check_engine(str(tmp_path), deepspeed=False)
    with pytest.raises(InputError, match="written under python3; a run under deepspeed would"):
        check_engine(str(tmp_path), deepspeed=True)
    (tmp_path / "global_step6").mkdir()
    check_engine(str(tmp_path), deepspeed=True)
    with pytest.raises(InputError, match="written under deepspeed; a run under python3 would"):
        check_engine(str(tmp_path), deepspeed=False)


def test_only_complete_checkpoints_make_older_ones_go(tmp_path):
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    finish(tmp_path / "checkpoint-12", {}, limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-12"]


BAD = {
    "not a corpus": ("text that is no JSON", "expected an array"),
    "an unknown role": (
        '[{"id": "x", "conversations": [{"from": "robot", "value": "a"}]}]',
        "conversation 0",
    ),
    "no turns": ('[{"id": "x", "conversations": []}]', "empty"),
    "a place outside the answer": (
        '[{"id": "x", "label_from": "a", "conversations": '
        '[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]',
        "label_from",
    ),
    "no answers": (
        '[{"id": "x", "conversations": [{"from": "human", "value": "a"}]}]',
        "no question with an answer",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_corpus_is_one_line(kind, tiny_base, tmp_path):
    content, expected = BAD[kind]
    path = tmp_path / "bad.json"
    path.write_text(content)
    done = run_here(TRAIN, *flags(tiny_base, path, tmp_path / "out"))
    assert_one_line(done, expected, str(path))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--model_name_or_path", "nowhere"], "nowhere"),
        (["--lora_target_modules", "no_proj"], "no such linear layer"),
        (["--resume_from_checkpoint", "True"], "no complete checkpoint"),
    ],
)
def test_bad_flags_are_one_line(more, expected, tiny_base, corpus, tmp_path):
    done = run_here(TRAIN, *flags(tiny_base, corpus, tmp_path / "out"), *more)
    assert_one_line(done, expected)


def test_a_finished_adapter_is_not_overwritten_unasked(tmp_path):
    (tmp_path / adapter.WEIGHTS).touch()
    with pytest.raises(InputError, match="holds a finished adapter"):
        starting_point(str(tmp_path), None, False)
    assert starting_point(str(tmp_path), None, True) is None
    clear(str(tmp_path))
    assert not list(tmp_path.iterdir())


def assert_one_line(done, *expected):
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert all(part in lines[0] for part in expected), lines[0]


@pytest.fixture(scope="module")
def adapted(tiny_base):
    """A base with an adapter that is as if it had learned something."""
    from llama_lora.model.base import load_base

    model = adapter.attach(load_base(tiny_base, "8bit"), 4, 8, 0.0, ["q_proj", "v_proj"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    return model


def test_verify_accepts_what_was_trained(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    adapter.verify(tmp_path, adapted)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ({"zero": "lora_B"}, "has learned nothing"),
        ({"nan": "layers.1.self_attn.q_proj.lora_A"}, "not finite"),
        ({"change": "layers.0.self_attn.v_proj.lora_A"}, "differs from the trained matrix"),
        ({"drop": "layers.0.self_attn.v_proj.lora_A"}, "first difference"),
        ({"truncate": ""}, "cannot be read"),
    ],
)
def test_verify_refuses_a_damaged_adapter(damage, expected, adapted, tmp_path):
    from safetensors.torch import load_file, save_file

    adapted.save_pretrained(tmp_path)
    path = tmp_path / adapter.WEIGHTS
    tensors = load_file(path)
    ((how, where),) = damage.items()
    chosen = [name for name in tensors if where in name]
    if how == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        for name in chosen:
            if how == "drop":
                del tensors[name]
            else:
                value = {"zero": 0.0, "nan": math.nan, "change": 1.0}[how]
                tensors[name] = torch.full_like(tensors[name], value)
        save_file(tensors, path)
    with pytest.raises(InputError, match=expected):
        adapter.verify(tmp_path, adapted)
