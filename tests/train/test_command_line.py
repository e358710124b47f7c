"""The flags of training: how they are told, those of other scripts, and each fault in one line."""

import dataclasses
import json
import os
import re
import runpy
import shlex
import signal
import sys

import pytest
import torch

from llama_lora.train import arguments, foreign_flags
from tests import conftest
from tests.conftest import ROOT, error_line, run_here, shipped

SCRIPT = ROOT / "fastchat/train/train_lora.py"
OURS = arguments.ModelArguments, arguments.DataArguments, arguments.LoraArguments
REQUIRED = ["--model_name_or_path", "base", "--data_path", "split.json"]
# Of those that transformers has and this project leaves as they are, the ones told first.
TWENTY = """
num_train_epochs max_steps gradient_accumulation_steps weight_decay max_grad_norm optim
neftune_noise_alpha seed fp16 bf16 deepspeed eval_strategy eval_steps output_dir save_strategy
save_steps save_total_limit resume_from_checkpoint report_to run_name
"""
ALPACA_LORA = r"""
--base_model 'decapoda-research/llama-7b-hf' --data_path 'yahma/alpaca-cleaned'
--output_dir './lora-alpaca' --batch_size 128 --micro_batch_size 4 --num_epochs 3
--learning_rate 1e-4 --cutoff_len 512 --val_set_size 2000 --lora_r 8 --lora_alpha 16
--lora_dropout 0.05 --lora_target_modules '[q_proj,v_proj]' --train_on_inputs --group_by_length
"""
TWO = ["q_proj", "v_proj"]
FASTCHAT = """
--lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --bf16 True --num_train_epochs 3
--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 1
--evaluation_strategy "no" --save_strategy "steps" --save_steps 1200 --save_total_limit 100
--learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine"
--logging_strategy "steps" --logging_steps 1 --tf32 True --model_max_length 256 --q_lora True
--gradient_checkpointing True --flash_attn False --lazy_preprocess True
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


@pytest.fixture
def parsed(monkeypatch):
    """The script's arguments, from those given after the required ones."""
    parse_args = runpy.run_path(str(SCRIPT))["parse_args"]

    def parse(*words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *REQUIRED, *map(str, words)])
        return parse_args()

    return parse


def value_of(parts, name: str):
    return next(getattr(part, name) for part in parts if hasattr(part, name))


def refused(*words) -> list[str]:
    """Run the script: what its lines of error say, after which one names --help, and no more."""
    done = run_here(SCRIPT, *words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    *faults, hint = done.stderr.splitlines()
    assert "--help" in hint
    assert not hint.startswith("error")
    assert all(fault.startswith("error: ") for fault in faults), done.stderr
    return [fault.removeprefix("error: ") for fault in faults]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "split.json"
    path.write_text(json.dumps(shipped("dummy_en.json")[:24]))
    return path


def test_help_shows_what_matters_first():
    done = run_here(SCRIPT, "--help")
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
    done = run_here(SCRIPT, "--help_all")
    assert (done.returncode, done.stderr) == (0, "")
    shown = flags_in(done.stdout)
    assert len(shown) == len(set(shown))
    everything = fields(*OURS, arguments.TrainingArguments)
    answered = {"fsdp", "push_to_hub", "load_best_model_at_end"}  # by a line of their own
    assert {"adam_beta1", "dataloader_num_workers", *our_own()} <= set(shown)
    assert not answered & set(shown)
    assert everything - set(shown) <= foreign_flags.ANSWERED


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize(
    ("flag", "value", "name", "meaning"),
    [
        ("--base_model", "elsewhere", "model_name_or_path", "elsewhere"),
        ("--micro_batch_size", "2", "per_device_train_batch_size", 2),
        ("--per_gpu_train_batch_size", "2", "per_device_train_batch_size", 2),
        ("--num_epochs", "7", "num_train_epochs", 7.0),
        ("--cutoff_len", "100", "model_max_length", 100),
        ("--cutoff-len", "100", "model_max_length", 100),
        ("--lora_target_modules", "[q_proj,v_proj]", "lora_target_modules", TWO),
        ("--lora_target_modules", '["q_proj", "v_proj"]', "lora_target_modules", TWO),
        ("--evaluation_strategy", "no", "eval_strategy", "no"),
        ("--activation_checkpointing", "True", "recompute", "True"),
        ("--wandb_run_name", "first", "run_name", "first"),
        ("--train_on_inputs", "False", "packing", True),
        ("--lora_bias", "none", "packing", True),
        ("--val_set_size", "0", "eval_ratio", 0.0),
        ("--lazy_preprocess", "False", "packing", True),
        ("--fsdp", "", "packing", True),
    ],
)
def test_what_means_the_same_is_taken_in_silence(
    flag, value, name, meaning, joined, parsed, capsys
):
    parts = parsed(*([f"{flag}={value}"] if joined else [flag, value]))
    assert value_of(parts, name) == meaning
    assert not parts[-1].not_needed
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "quantization", "told"),
    [
        (["--load_8bit", "True"], "8bit", "--load_8bit: here --quantization 8bit"),
        (["--load_in_4bit=True"], "4bit", "--load_in_4bit: here --quantization 4bit"),
        (["--q_lora"], "4bit", "--q_lora: here --quantization 4bit"),
        (["--q_lora", "True", "--quantization", "4bit"], "4bit", "--quantization 4bit"),
        (["--q_lora", "False"], "auto", "16 bits are --quantization none"),
        (["--load_8bit=no", "--quantization", "none"], "none", "16 bits are --quantization none"),
    ],
)
def test_the_precision_by_other_names(words, quantization, told, parsed):
    parts = parsed(*words)
    assert value_of(parts, "quantization") == quantization
    (line,) = parts[-1].not_needed
    assert told in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--q_lora", "off"], "--q_lora off: expected True or False"),
        (["--q_lora=maybe"], "--q_lora maybe: expected True or False"),
        (["--load_in_8bit", "True", "--load_in_4bit", "True"], "expected one precision"),
        (["--quantization", "none", "--q_lora", "True"], "expected one precision"),
        (["--lazy_preprocess", "True", "\u2013lora_r", "64"], "\u2013lora_r: belongs to no flag"),
        (["--q_lora", "True", "\u2013lora_r", "64"], "\u2013lora_r: belongs to no flag"),
        (["--flash_attn", "False", "extra.json"], "extra.json: belongs to no flag"),
    ],
)
def test_nothing_that_stands_beside_a_foreign_flag_is_passed_over(words, told):
    assert told in refused(*REQUIRED, *words)[0]


def test_settings_of_deepspeed_may_be_spelled_out(parsed):
    assert parsed("--deepspeed", '{"zero_optimization": {"stage": 2}}')[-1].deepspeed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--torch_compile_mode", "default"], "nothing is compiled"),
        (["--torch_compile_backend", "inductor"], "nothing is compiled"),
        (["--no_cuda", "False"], "--use_cpu"),
        (["--add_eos_token", "False"], "end-of-answer"),
        (["--lazy_preprocess", "True"], "--token_cache"),
        (["--lazy_preprocess=True"], "--token_cache"),
        (["--lazy-preprocess"], "--token_cache"),
        (["--flash_attn", "True"], "fastest"),
        (["--group_by_length"], "--packing False"),
        (["--cache_dir", "~/.cache"], "--token_cache"),
        (["--trust_remote_code", "True"], "never run"),
        (["--padding_side", "left"], "padded"),
        (["--add_eos_token"], "end-of-answer"),
        (["--save_safetensors", "True"], "always"),
        (["--load_best_model_at_end", "True"], "lowest held-out loss"),
        (["--auto_find_batch_size", "True"], "parts"),
        (["--use_liger_kernel", "True"], "loss"),
        (["--torch_compile", "True"], "compile"),
        (["--bf16_full_eval", "True"], "training"),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": false}'], "recompute"),
        (["--train_sampling_strategy", "group_by_length"], "--seed"),
    ],
)
def test_what_asks_for_nothing_else_is_told_in_a_line(words, told, parsed):
    args = parsed(*words)[-1]
    assert len(args.not_needed) == 1
    assert args.not_needed[0].startswith(words[0].partition("=")[0] + ": ")
    assert told in args.not_needed[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--batch_size", "128"], "--gradient_accumulation_steps"),
        (["--batch_size=128"], "--gradient_accumulation_steps"),
        (["--val_set_size", "2000"], "--eval_ratio"),
        (["--train_on_inputs"], "only answers"),
        (["--train_on_inputs", "True"], "only answers"),
        (["--prompt_template_name", "alpaca"], "--template"),
        (["--wandb_project", "mine"], "WANDB_PROJECT"),
        (["--save_safetensors", "False"], "safetensors"),
        (["--lora_bias", "all"], "frozen"),
        (["--lora_weight_path", "./lora_weights"], "--resume_from_checkpoint"),
        (["--fsdp", "full_shard auto_wrap"], "--deepspeed ./deepspeed-config.json"),
        (["--fsdp=full_shard auto_wrap"], "--deepspeed ./deepspeed-config.json"),
        (["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"], "--deepspeed"),
        (["--push_to_hub", "True"], "hf upload"),
        (["--save_only_model", "True"], "--save_strategy no"),
    ],
)
def test_what_would_lose_its_meaning_is_refused_with_the_way_on(words, told):
    (fault,) = refused(*REQUIRED, *words)
    flag, _, value = words[0].partition("=")
    value = value or " ".join(words[1:])
    assert fault.startswith(f"{flag} {value}".rstrip() + ": ")
    assert told in fault


def test_the_readmes_command_of_alpaca_lora_is_answered_all_at_once():
    faults = refused(*shlex.split(ALPACA_LORA))
    assert [fault.split()[0].rstrip(":") for fault in faults] == [
        *("--batch_size", "--val_set_size", "--train_on_inputs")
    ]


def test_the_readmes_command_of_fastchat_runs(tiny_base, corpus, tmp_path):
    own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", tmp_path]
    done = run_here(SCRIPT, *own, *shlex.split(FASTCHAT), "--dry_run", "True")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--lazy_preprocess: ") == 1
    assert done.stdout.startswith("--q_lora: here --quantization 4bit\n--lazy_preprocess: ")
    if not torch.cuda.is_available():
        assert done.stdout.count("--tf32 True: not on CPU") == 1
    assert "4bit base, as asked for" in done.stdout


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
    done = run_here(SCRIPT, *REQUIRED, "--lora_rank", "8")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_bare_gradient_checkpointing_is_true(parsed):
    assert parsed("--gradient_checkpointing", "--bf16")[-1].recompute == "True"


@pytest.mark.parametrize("more", [[], ["--warmup_steps", 5], ["--lr_scheduler_type", "linear"]])
def test_a_step_without_a_learning_rate_is_refused(more, tiny_base, corpus, tmp_path):
    own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", tmp_path]
    done = run_here(SCRIPT, *own, "--model_max_length", 256, "--max_steps", 1, *more)
    told = error_line(done)
    assert "the only step" in told
    assert "warm-up" in told
    assert "--warmup_ratio 0" in told
    assert "parameters" not in done.stdout  # of a base that was loaded
    assert not list(tmp_path.iterdir())


def test_a_step_with_a_learning_rate_trains(tiny_base, corpus, tmp_path):
    own = ["--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", tmp_path]
    more = ["--model_max_length", 256, "--max_steps", 1, "--lr_scheduler_type", "constant"]
    done = run_here(SCRIPT, *own, *more)
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
        done = run_here(SCRIPT, *own, *batch)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert done.returncode == 0, done.stderr
    assert "stopped by SIGUSR1 after step 1 of" in done.stdout
