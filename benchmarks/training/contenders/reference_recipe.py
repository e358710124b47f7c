"""The reference: FastChat's LoRA recipe, padded to the maximum length, with the plain loss.

python3 -m benchmarks.training.contenders.reference_recipe --base .demo/base --data split.json \\
    --out .bench/reference --max-length 512 --steps 4

The data come from the installed fschat's own `SupervisedDataset`: its prompt, padding, masks. Its
arithmetic of lengths presumes Llama's SentencePiece tokenizer, and with any other leaves most
conversations without a label or with shifted ones. So that the comparison does not gain from that,
three things are made as it presumes them: its prompt ends an answer with the tokenizer's own
end-of-sequence token; the tokenizer begins with a bos, which is cut off again afterwards; and it is
`legacy`, which is the branch whose lengths then are right.

Everything else is as in fschat's `train_lora.py` with the flags of its README: LoRA of rank 8 on
the query and value projections, dropout 0.05, learning rate 2e-5 with a cosine and 3% of warm-up.
"""

import argparse
from types import SimpleNamespace

from benchmarks.training.contenders import recipe_log
from benchmarks.training.contenders.recipe_log import RecipeLog


def parse_args() -> argparse.Namespace:
    parser = recipe_log.parser(__doc__)
    add = parser.add_argument
    add("--max-length", type=int, default=512, help="tokens that every conversation is padded to")
    add("--batch", type=int, default=14, help="conversations per step")
    add("--gradient-checkpointing", action="store_true", help="recompute in the backward pass")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from transformers import Trainer, set_seed

    set_seed(args.seed)
    dataset = load_data(args)
    trainer = Trainer(
        model=load_model(args),
        args=training_arguments(args),
        train_dataset=dataset,
        callbacks=[RecipeLog(args.out, args.max_minutes)],
    )
    trainer.model.config.use_cache = False
    trainer.train()
    trainer.model.save_pretrained(args.out)


def load_data(args: argparse.Namespace):
    """The corpus as fschat's data module pads and masks it, without the bos it needs for that."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    from fastchat.train import train as fschat

    tokenizer = AutoTokenizer.from_pretrained(
        args.base,
        model_max_length=args.max_length + 1,
        padding_side="right",
        trust_remote_code=False,
    )
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.legacy = True
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A",
        special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)],
    )
    conversation = fschat.get_conversation_template("vicuna")
    conversation.sep2 = tokenizer.eos_token
    fschat.get_conversation_template = lambda _: conversation.copy()

    module = fschat.make_supervised_data_module(
        tokenizer, SimpleNamespace(data_path=args.data, eval_data_path=None, lazy_preprocess=False)
    )
    dataset = module["train_dataset"]
    for name in ("input_ids", "labels", "attention_mask"):
        setattr(dataset, name, getattr(dataset, name)[:, 1:])
    return dataset


def load_model(args: argparse.Namespace):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from llama_lora.model.base import load_base

    model = load_base(args.base, args.quantization)
    model.set_attn_implementation("sdpa")  # transformers' own
    if args.quantization != "none":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=args.gradient_checkpointing
        )
    elif args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def training_arguments(args: argparse.Namespace):
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=args.out,
        per_device_train_batch_size=args.batch,
        learning_rate=2e-5,
        weight_decay=0.0,
        warmup_steps=0.03,  # a share of the steps
        lr_scheduler_type="cosine",
        **recipe_log.every_step(args),
    )


if __name__ == "__main__":
    main(parse_args())
