"""LLaMA-Factory's LoRA training on the same conversations, run by the Python of its environment.

python3 -m benchmarks.training.contenders.llama_factory_recipe --data split.json \\
    --base .bench/training/base-float32 --out .bench/llama-factory --steps 4

It reads the conversations as ShareGPT's, and takes the prompt from the base's folder: its own
template `vicuna` leaves out the spaces before USER and before answers. Two kinds of settings:

example: those of its LoRA example, examples/train_lora/qwen3_lora_sft.yaml at v0.9.5 (the one for
Llama 3 until v0.9.3 has the same), without its limit of 1,000 conversations.

packed: for a comparison of speed, LoRA as this project's defaults have it, examples packed in rows
of `--length` tokens, `--batch` of which are one step, and kept apart by `neat_packing`.

Nothing is recomputed in the backward pass, which is its default: memory is not scarce here.
"""

import argparse
import json
from pathlib import Path

from benchmarks.training.contenders import recipe_log
from benchmarks.training.contenders.recipe_log import RecipeLog

SETTINGS = {
    "example": {
        "lora_rank": 8,
        "cutoff_len": 2048,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # a share of the steps
    },
    "packed": {
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "packing": True,
        "neat_packing": True,
    },
}


def parse_args() -> argparse.Namespace:
    return recipe_log.parser_of_settings(__doc__, SETTINGS, "example").parse_args()


def main(args: argparse.Namespace) -> None:
    from llamafactory.train.tuner import run_exp

    log = RecipeLog(args.out, args.max_minutes)
    describe(args.data, args.out)
    told = settings(args)
    run_exp(told, callbacks=[log])
    for file in Path(told["output_dir"]).glob("adapter_*"):
        file.rename(args.out / file.name)


def describe(data: Path, folder: Path) -> None:
    """Say where the conversations are, and in which format, as LLaMA-Factory asks for it."""
    pieces = {"file_name": str(data.resolve()), "formatting": "sharegpt"}
    (folder / "dataset_info.json").write_text(json.dumps({"pieces": pieces}))


def settings(args: argparse.Namespace) -> dict:
    """What a user would write in LLaMA-Factory's yaml file."""
    told = {
        "model_name_or_path": str(args.base),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "dataset_dir": str(args.out),
        "dataset": "pieces",
        "default_system": system_message(args.base),
        "output_dir": str(args.out / "trained"),  # its own log has the name of ours
        "overwrite_cache": True,
        "disable_gradient_checkpointing": True,
        **recipe_log.every_step(args),
        **SETTINGS[args.settings],
    }
    if args.settings == "packed":
        told |= {"cutoff_len": args.length, "per_device_train_batch_size": args.batch}
    if args.quantization != "none":
        told["quantization_bit"] = int(args.quantization.removesuffix("bit"))
    return told


def system_message(base: Path) -> str:
    """What the base's chat template says before the first turn, which LLaMA-Factory misreads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    return prompt.split(" USER:")[0].removeprefix(tokenizer.bos_token or "")


if __name__ == "__main__":
    main(parse_args())
