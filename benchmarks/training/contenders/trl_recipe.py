"""TRL's SFTTrainer on the same conversations.

python3 -m benchmarks.training.contenders.trl_recipe --base .demo/base --data split.json \\
    --out .bench/trl --steps 4

Given are only the base in its precision, the conversations as `messages` with the prompt that they
are meant for (a chat template is part of the task), and the number of steps. So by its defaults,
with peft's default LoRA, TRL learns every token of a conversation, pads a batch to its longest, and
truncates at 1,024 tokens. `--settings` are others':

docs: what the LoRA command in the documentation of its sft.py sets beyond that.

unsloth: of unsloth's notebook "Llama3.2 (1B and 3B) Conversational" (repository unslothai/notebooks
at bdda2efc), which learns the answers only. unsloth itself needs a card, for kernels that compute
the same faster, and the notebook's base has 4 bits.

packed: for a comparison of speed, LoRA as this project's defaults have it, answers only, examples
packed in rows of `--length` tokens, `--batch` of which are one step.

Nothing is recomputed in the backward pass, which is TRL's default: memory is not scarce here.
"""

import argparse
import json
import sys

from benchmarks.training.contenders import recipe_log
from benchmarks.training.contenders.recipe_log import RecipeLog

ALL_LINEAR = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LORA = {
    "defaults": {},
    "docs": {"r": 32, "lora_alpha": 16},
    "unsloth": {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, **ALL_LINEAR},
    "packed": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, **ALL_LINEAR},
}
TRAINING = {
    "defaults": {},
    "docs": {
        "learning_rate": 2e-4,
        "packing": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
    },
    "unsloth": {
        "max_length": 2048,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "warmup_steps": 5,
        "learning_rate": 2e-4,
        "optim": "adamw_8bit",
        "weight_decay": 0.001,
        "lr_scheduler_type": "linear",
    },
    "packed": {"packing": True},
}
ANSWERS_ONLY = ("unsloth", "packed")


def parse_args() -> argparse.Namespace:
    return recipe_log.parser_of_settings(__doc__, LORA, "defaults").parse_args()


def main(args: argparse.Namespace) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from llama_lora.model.base import load_base
    from llama_lora.model.template import Template, load_tokenizer

    set_seed(args.seed)
    template = Template(load_tokenizer(args.base))
    model = load_base(args.base, args.quantization)
    model.set_attn_implementation("sdpa")  # transformers' own
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(args.out),
            gradient_checkpointing=False,
            **recipe_log.every_step(args),
            **training(args),
        ),
        train_dataset=Dataset.from_list(examples(args, template)),
        processing_class=template.tokenizer,
        peft_config=LoraConfig(**LORA[args.settings]),
        callbacks=[RecipeLog(args.out, args.max_minutes)],
    )
    if trainer.padding_free:
        check_separate(trainer)
    trainer.train()
    trainer.save_model(str(args.out))


def training(args: argparse.Namespace) -> dict:
    rows = {"max_length": args.length, "per_device_train_batch_size": args.batch}
    return TRAINING[args.settings] | (rows if args.settings == "packed" else {})


def examples(args: argparse.Namespace, template) -> list[dict]:
    """The corpus in the format that TRL calls conversational, or with labels at its answers."""
    conversations = [item["conversations"] for item in json.loads(args.data.read_text())]
    if args.settings not in ANSWERS_ONLY:
        return [{"messages": messages(turns)} for turns in conversations]
    encoded = template.encode_batch([{"conversations": turns} for turns in conversations])
    return [{"input_ids": one.ids, "labels": one.labels} for one in encoded]


def messages(turns: list[dict]) -> list[dict]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]


def check_separate(trainer) -> None:
    """That an example in a packed row is computed as if no other were before it.

    TRL's documentation promises this for FlashAttention only. Without it, transformers has to find
    from the positions where examples begin.
    """
    import torch

    first, other, second = ([start + i for i in range(40)] for start in (100, 200, 300))

    def loss(before: list[int]) -> float:
        labels = [-100] * len(before) + second
        row = {"input_ids": before + second, "labels": labels}
        inputs = trainer.data_collator([row | {"seq_lengths": [len(before), len(second)]}])
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs)).item()

    trainer.model.eval()
    losses = loss(first), loss(other)
    trainer._metrics["eval"].clear()
    print(f"packed examples: losses {losses} after different ones", flush=True)
    if abs(losses[0] - losses[1]) > 1e-6:
        sys.exit("error: packed examples see those before them")


if __name__ == "__main__":
    main(parse_args())
