"""Flags that people bring along in commands for FastChat, alpaca-lora and older transformers."""

import argparse
import re

from transformers.hf_argparser import string_to_bool

FLAG = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)
OFF = {"false", "f", "no", "n", "0", "none", ""}  # values that ask for nothing

# Other names of flags.
SAME = {
    "base_model": "model_name_or_path",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "cutoff_len": "model_max_length",
    "wandb_run_name": "run_name",
    "evaluation_strategy": "eval_strategy",
    "activation_checkpointing": "gradient_checkpointing",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}

# Other names of what `--quantization` says.
PRECISION = {
    "q_lora": "4bit",
    "load_4bit": "4bit",
    "load_in_4bit": "4bit",
    "load_8bit": "8bit",
    "load_in_8bit": "8bit",
}

NOT_QUANTIZED = "without --quantization the card decides; 16 bits are --quantization none"

# What asks for nothing else than what happens anyway, or for it to happen some other way.
NOT_NEEDED = {
    "lazy_preprocess": "tokens are kept on the disk and memory-mapped, in --token_cache",
    "preprocessed_path": "tokens are kept in --token_cache",
    "cache_dir": "the base is a folder, and tokens are kept in --token_cache",
    "flash_attn": "attention takes the fastest of torch's kernels for the card",
    "group_by_length": "examples are packed, and nothing is padded; --packing False groups them",
    "train_sampling_strategy": "examples are packed, in an order that --seed decides",
    "padding_side": "nothing is padded",
    "add_eos_token": "every answer ends in its end-of-answer token",
    "trust_remote_code": "code in a base's folder is never run",
    "save_safetensors": "adapters are always safetensors",
    "load_best_model_at_end": "the adapter with the lowest held-out loss is the one saved",
    "auto_find_batch_size": "a micro-batch that does not fit is computed in parts",
    "use_liger_kernel": "the loss is computed in chunks anyway, without its kernels",
    "gradient_checkpointing_kwargs": "how layers recompute is settled",
    "activation_checkpointing_kwargs": "how layers recompute is settled",
    "bf16_full_eval": "measuring computes as training does",
    "fp16_full_eval": "measuring computes as training does",
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        "nothing is compiled, since hardly two micro-batches are of one length",
    ),
}
ALWAYS = {"add_eos_token", "load_best_model_at_end"}  # what happens, whatever is asked for

SEVERAL_CARDS = "for several cards: deepspeed --num_gpus=N … --deepspeed ./deepspeed-config.json"

# What would lose its meaning, and what does it here.
REFUSED = {
    "batch_size": "here --gradient_accumulation_steps, the number of micro-batches in a step: "
    "--batch_size over --micro_batch_size",
    "val_set_size": "here --eval_ratio, a share of the conversations, or a file, --eval_data_path",
    "train_on_inputs": "only answers are learned here; leave it out",
    "prompt_template_name": "here --template, vicuna_v1.1 or model, the base's own",
    "wandb_project": "here the environment variable WANDB_PROJECT, with --report_to wandb",
    "wandb_watch": "here the environment variable WANDB_WATCH, with --report_to wandb",
    "wandb_log_model": "here the environment variable WANDB_LOG_MODEL, with --report_to wandb",
    "not save_safetensors": "adapters are always safetensors; leave it out",
    "lora_bias": "biases stay frozen; leave it out",
    "lora_weight_path": "training begins with new matrices, or goes on from a checkpoint: "
    "--resume_from_checkpoint",
    "fsdp": SEVERAL_CARDS,
    "fsdp_config": SEVERAL_CARDS,
    "fsdp_min_num_params": SEVERAL_CARDS,
    "fsdp_transformer_layer_cls_to_wrap": SEVERAL_CARDS,
    "save_only_model": "no run could go on from such a checkpoint; --save_strategy no saves none",
    "push_to_hub": "upload the finished adapter: hf upload OWNER/NAME FOLDER",
}
ANSWERED = {*SAME, *PRECISION, *NOT_NEEDED, *REFUSED, "no_cuda"}


def translated(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """A command line with the flags of this project alone.

    Returns:
        `words` with ours in the place of those of other scripts; a line for each that is not
        needed; a line for each that has to be another.
    """
    own, notes, faults = [], [], []
    precisions: dict[str, str] = {}
    for group in by_flag(words):
        flag, values = parts(group)
        name = flag.lstrip("-").replace("-", "_")
        if name in SAME:
            own += [f"--{SAME[name]}", *values]
            continue
        if name not in ANSWERED:
            own += group
            if name == "quantization":
                precisions[flag] = " ".join(values)
            continue
        value = values[0] if values else ""
        faults += [f"{word}: belongs to no flag" for word in values[1:]]
        asked = f"not {name}" if values and value.lower() in OFF and name not in ALWAYS else name
        if name == "no_cuda":
            own += ["--use_cpu", *values[:1]]
            notes.append(f"{flag}: here --use_cpu, which holds wherever no card is seen")
        elif name in PRECISION:
            try:
                if values and not string_to_bool(value):
                    notes.append(f"{flag} {value}: {NOT_QUANTIZED}")
                    continue
            except argparse.ArgumentTypeError:
                faults.append(f"{flag} {value}: expected True or False")
                continue
            precisions[flag] = PRECISION[name]
            own += ["--quantization", PRECISION[name]]
            notes.append(f"{flag}: here --quantization {PRECISION[name]}")
        elif asked in NOT_NEEDED:
            notes.append(f"{flag}: not needed; {NOT_NEEDED[asked]}")
        elif asked in REFUSED:
            faults.append(f"{flag} {value}".rstrip() + f": {REFUSED[asked]}")
    if len(set(precisions.values())) > 1:
        faults.append(f"{', '.join(precisions)}: expected one precision of the base")
    return own, notes, faults


def by_flag(words: list[str]) -> list[list[str]]:
    """`words` in groups: a flag with what follows it; what comes before the first has none."""
    groups = [[]]
    for word in words:
        if FLAG.fullmatch(word):
            groups.append([])
        groups[-1].append(word)
    return [group for group in groups if group]


def parts(group: list[str]) -> tuple[str, list[str]]:
    """The flag of a group and its values, `--flag=value` or apart; no flag before the first."""
    if not FLAG.fullmatch(group[0]):
        return "", group
    flag, joined, value = group[0].partition("=")
    return flag, [value] * bool(joined) + group[1:]
