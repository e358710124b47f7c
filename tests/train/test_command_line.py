"""The flags of training: how they are told, and each fault in one line."""

import dataclasses
import json
import os
import re
import signal

import pytest
import torch

from llama_lora.train import arguments, foreign_flags
from tests import conftest
from tests.conftest import TRAIN, error_line, run_here, shipped
from tests.train.commands import REQUIRED, refused

OURS = arguments.ModelArguments, arguments.DataArguments, arguments.LoraArguments
# Of those that transformers has and this project leaves as they are, the ones told first.
TWENTY = """
num_train_epochs max_steps gradient_accumulation_steps weight_decay max_grad_norm optim
neftune_noise_alpha seed fp16 bf16 deepspeed eval_strategy eval_steps output_dir save_strategy
save_steps save_total_limit resume_from_checkpoint report_to run_name
"""


def fields(*parts) -> set[str]:
    return {field.name for part in parts for field in dataclasses.fields(part) if field.init}


def our_own() -> set[str]:
    """The flags that this project adds, or whose default it changes."""
    changed = set(arguments.TrainingArguments.__annotations__)
    return fields(*OURS) | changed


def flags_in(text: str) -> list[str]:
    """The flags that a help begins its lines with."""
    return re.findall(r"^  --([\w-]+)", text, re.MULTILINE)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "split.json"
    path.write_text(json.dumps(shipped("dummy_en.json")[:24]))
    return path


def test_help_shows_what_matters_first():
    done = run_here(TRAIN, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    shown = [name for name in flags_in(done.stdout) if name not in ("help", "help_all")]
    assert len(shown) == len(set(shown))
    assert set(shown) == our_own() | set(TWENTY.split())
    assert len(TWENTY.split()) == 20
    assert "transformers.TrainingArguments are accepted too: --help_all" in done.stdout
    assert len(done.stdout.splitlines()) < 200
    groups = re.findall(r"^(\w[\w ,]*):$", done.stdout, re.MULTILINE)
    assert groups[:4] == ["model", "data", "LoRA", "training"]
    assert not re.search(r"default: (None|False|\[|<|\w+\.[A-Z])", done.stdout)
    assert "--lora_r N " in done.stdout
    assert "(default: 16)" in done.stdout


def test_help_all_shows_every_flag_once():
    done = run_here(TRAIN, "--help_all")
    assert (done.returncode, done.stderr) == (0, "")
    shown = flags_in(done.stdout)
    assert len(shown) == len(set(shown))
    everything = fields(*OURS, arguments.TrainingArguments)
    answered = {"fsdp", "push_to_hub", "load_best_model_at_end"}  # by a line of their own
    assert {"adam_beta1", "dataloader_num_workers", *our_own()} <= set(shown)
    assert not answered & set(shown)
    assert everything - set(shown) <= foreign_flags.ANSWERED


def test_settings_of_deepspeed_may_be_spelled_out(parsed):
    assert parsed("--deepspeed", '{"zero_optimization": {"stage": 2}}')[-1].deepspeed


def test_the_folder_of_tensorboards_files(monkeypatch, parsed, tmp_path):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
    parsed("--logging_dir", tmp_path)
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path)


@pytest.mark.parametrize("flag", ["--no_cuda", "--use_cpu"])
def test_a_card_is_hidden_and_not_passed_over(flag, parsed, monkeypatch, capsys):
    assert parsed(flag, "True")[-1].use_cpu or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as end:
        parsed(flag, "True")
    assert end.value.code == 2
    assert "CUDA_VISIBLE_DEVICES= " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "flags", "nearest"),
    [
        (["--lora_rank", "8"], ["--lora_rank"], "--lora_r?"),
        (["--lora_rank=8"], ["--lora_rank"], "--lora_r?"),
        (["--learning-rates", "1"], ["--learning-rates"], "--learning_rate?"),
        (["--lora_target", "q_proj", "v_proj"], ["--lora_target"], "--lora_target_modules?"),
        (["--epoch", "2", "--warmup", "0.1"], ["--epoch", "--warmup"], "--num_train_epochs?"),
        (["--adam_epsilom", "1"], ["--adam_epsilom"], "--adam_epsilon?"),
        (["--qqqqqq"], ["--qqqqqq"], "no such flag"),
        (["-lora_r", "8"], ["-lora_r"], "--lora_r?"),
        (["--bf16", "True", "twice"], ["twice"], "belongs to no flag"),
        (["--max_steps", "-1", "-5"], ["-5"], "belongs to no flag"),
    ],
)
def test_an_unknown_flag_and_the_nearest(words, flags, nearest):
    """An abbreviation, too: of two flags that begin alike, it would be the wrong one someday."""
    faults = refused(*REQUIRED, *words)
    assert [fault.split()[0].rstrip(":") for fault in faults] == flags
    assert nearest in faults[0]


def test_a_slip_in_a_required_flag_is_told_with_what_is_missing():
    faults = refused("--model_name_or_pth", "base", "--train_on_inputs")
    assert len(faults) == 3
    assert "--train_on_inputs" in faults[0]
    assert "did you mean --model_name_or_path?" in faults[1]
    assert faults[2] == "the following arguments are required: --model_name_or_path, --data_path"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lora_r", "many"], "--lora_r: invalid int value: 'many'"),
        (["--lora_r"], "--lora_r: expected one argument"),
        (["--template", "alpaca"], "--template: invalid choice: 'alpaca'"),
        (["--packing", "maybe"], "--packing: "),
        (["--evaluation_strategy", "bogus"], "--eval_strategy: invalid choice: 'bogus'"),
        (["--lr_scheduler_type", "steep"], "--lr_scheduler_type: invalid choice: 'steep'"),
        (["--optim", "sdg"], "--optim: invalid choice: 'sdg'"),
        (["--save_strategy", "best"], "--save_strategy best: "),
        (["--report_to", "nobody"], "--report_to nobody: "),
        (["--lr_scheduler_kwargs", "{bad"], "{bad: expected JSON"),
        (["--accelerator_config", "nowhere.json"], "nowhere.json: No such file"),
        (["--deepspeed", "playground/s2.json"], "./deepspeed-config.json"),
        (["--fp16", "True", "--bf16", "True"], "--fp16 True --bf16 True: expected one of them"),
        (["--evaluation_strategy", "steps"], "--eval_data_path"),
        (["--learning_rate", "0"], "--learning_rate 0.0: expected a number above 0"),
        (["--learning_rate", "nan"], "--learning_rate nan: expected a number above 0"),
        (["--base_name", "./base"], "--base_name ./base: expected an id on the Hub, owner/name"),
        (["--plan_for", "T4"], "--plan_for: needs --dry_run True"),
        (["--per_device_train_batch_size", "0"], "expected auto or a number from 1"),
        (["--per_device_train_batch_size", "many"], "expected auto or a number from 1"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size 0: expected"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0: expected"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0.0: expected a number above 0"),
        (["--seed", "-1"], "--seed -1: expected"),
        (["--lora_target_modules", "[]"], "--lora_target_modules: expected"),
    ],
)
def test_a_bad_value_is_one_line(words, told):
    (fault,) = refused(*REQUIRED, *words)
    assert told in fault


def test_values_out_of_range_are_told_all_at_once():
    faults = refused(*REQUIRED, "--eval_ratio", "2", "--lora_r", "0", "--model_max_length", "3")
    assert faults == [
        "--eval_ratio 2.0: expected 0 to 0.5",
        "--model_max_length 3: expected at least 16",
        "--lora_r 0: expected at least 1",
    ]


def test_several_processes_tell_a_fault_once(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    done = run_here(TRAIN, *REQUIRED, "--lora_rank", "8")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_bare_gradient_checkpointing_is_true(parsed):
    assert parsed("--gradient_checkpointing", "--bf16")[-1].recompute == "True"


@pytest.mark.parametrize("more", [[], ["--warmup_steps", 5], ["--lr_scheduler_type", "linear"]])
def test_a_step_without_a_learning_rate_is_refused(more, tiny_base, corpus, tmp_path):
    own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", tmp_path]
    done = run_here(TRAIN, *own, "--model_max_length", 256, "--max_steps", 1, *more)
    told = error_line(done)
    assert "the only step" in told
    assert "warm-up" in told
    assert "--warmup_ratio 0" in told
    assert "parameters" not in done.stdout  # of a base that was loaded
    assert not list(tmp_path.iterdir())


def test_a_step_with_a_learning_rate_trains(tiny_base, corpus, tmp_path):
    own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", tmp_path]
    more = ["--model_max_length", 256, "--max_steps", 1, "--lr_scheduler_type", "constant"]
    done = run_here(TRAIN, *own, *more)
    assert done.returncode == 0, done.stderr
    assert "the adapter is complete" in done.stdout


def test_a_signal_is_heeded_from_when_it_is_offered(tiny_base, corpus, tmp_path, monkeypatch):
    class Signalled(conftest.Printed):
        def write(self, text):
            if "kill -USR1 " in text:
                assert f"kill -USR1 {os.getpid()}" in text
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().write(text)

    def not_yet(*_):
        raise AssertionError("the signal that the log offers would end the run")

    before = signal.signal(signal.SIGUSR1, not_yet)
    monkeypatch.setattr(conftest, "Printed", Signalled)
    own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", tmp_path]
    batch = ["--model_max_length", 256, "--per_device_train_batch_size", 2]
    try:
        done = run_here(TRAIN, *own, *batch)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert done.returncode == 0, done.stderr
    assert "stopped by SIGUSR1 after step 1 of" in done.stdout
