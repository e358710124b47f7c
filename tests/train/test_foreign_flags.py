"""Flags of FastChat, alpaca-lora and older transformers: understood, or answered in a line."""

import shlex

import pytest
import torch

from tests.conftest import TRAIN, run_here, shipped
from tests.corpora import save
from tests.train.commands import REQUIRED, refused, value_of

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


def test_the_readmes_command_of_fastchat_runs(tiny_base, tmp_path):
    corpus = save(tmp_path / "split.json", shipped("dummy_en.json")[:24])
    own = [
        "--model_name_or_path",
        tiny_base,
        "--data_path",
        corpus,
        "--output_dir",
        tmp_path / "out",
    ]
    done = run_here(TRAIN, *own, *shlex.split(FASTCHAT), "--dry_run", "True")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--lazy_preprocess: ") == 1
    assert done.stdout.startswith("--q_lora: here --quantization 4bit\n--lazy_preprocess: ")
    if not torch.cuda.is_available():
        assert done.stdout.count("--tf32 True: not on CPU") == 1
    assert "4bit base, as asked for" in done.stdout
