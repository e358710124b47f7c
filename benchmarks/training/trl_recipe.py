"""TRL's SFTTrainer with its own defaults and peft's default LoRA, on the same conversations.

python3 -m benchmarks.training.trl_recipe --base .demo/base --data split.json \\
    --out .bench/trl --steps 4

Given are only the base in its precision, the conversations as `messages` with the prompt that they
are meant for (a chat template is part of the task), and the number of steps. So TRL learns every
token of a conversation, pads a batch to its longest, and truncates at 1,024 tokens. `--as-in-docs`
takes what the LoRA command in the documentation of its sft.py sets beyond that: learning rate 2e-4,
packing, rank 32, and 2 rows with 8 accumulated.
"""

import argparse
import json
from pathlib import Path

from benchmarks.training import recipe_log
from benchmarks.training.recipe_log import RecipeLog
from benchmarks.training.reference_recipe import precision

AS_IN_DOCS = {
    "learning_rate": 2e-4,
    "packing": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
}


def parse_args() -> argparse.Namespace:
    parser = recipe_log.parser(__doc__)
    add = parser.add_argument
    add("--as-in-docs", action="store_true", help="the settings of the LoRA command in its docs")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from llama_lora.model.base import load_base
    from llama_lora.model.template import Template, load_tokenizer

    log = RecipeLog(args.out, args.max_minutes)
    trainer = SFTTrainer(
        model=load_base(args.base, args.quantization),
        args=SFTConfig(
            output_dir=str(args.out),
            max_steps=args.steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **precision(),
            **(AS_IN_DOCS if args.as_in_docs else {}),
        ),
        train_dataset=Dataset.from_list(read_messages(args.data)),
        processing_class=Template(load_tokenizer(args.base)).tokenizer,
        peft_config=LoraConfig(r=32, lora_alpha=16) if args.as_in_docs else LoraConfig(),
        callbacks=[log],
    )
    log.count_labels(trainer)
    trainer.train()
    trainer.save_model(str(args.out))


def read_messages(data: Path) -> list[dict]:
    """The corpus in the format that TRL calls conversational."""
    roles = {"human": "user", "gpt": "assistant"}
    return [
        {
            "messages": [
                {"role": roles[turn["from"]], "content": turn["value"]}
                for turn in item["conversations"]
            ]
        }
        for item in json.loads(data.read_text())
    ]


if __name__ == "__main__":
    main(parse_args())
