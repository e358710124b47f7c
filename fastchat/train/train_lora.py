"""Fine-tune a LoRA adapter on an 8-bit Llama base.

deepspeed --num_gpus=1 fastchat/train/train_lora.py --deepspeed ./deepspeed-config.json \
    --model_name_or_path ./base --data_path ./split.json --output_dir ./output --fp16 True \
    --num_train_epochs 1 --per_device_train_batch_size 14 --gradient_checkpointing True
"""

import json
from pathlib import Path

from llama_lora.cli import one_line_errors


def parse_args():
    from transformers import HfArgumentParser

    from llama_lora.train import arguments

    parser = HfArgumentParser(
        (
            arguments.ModelArguments,
            arguments.DataArguments,
            arguments.LoraArguments,
            arguments.TrainingArguments,
        ),
        description=__doc__.split("\n")[0],
    )
    try:
        parsed = parser.parse_args_into_dataclasses()
        arguments.check(*parsed)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    return parsed


@one_line_errors
def main(model_args, data_args, lora_args, args):
    from llama_lora.model import adapter
    from llama_lora.model.base import check_folder, load_base
    from llama_lora.model.hardware import resolve_quantization
    from llama_lora.model.template import Template, load_tokenizer
    from llama_lora.train import checkpoints
    from llama_lora.train.trainer import LoraTrainer, quieten

    quieten(args)
    checkpoint = checkpoints.starting_point(
        args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir
    )
    if checkpoint:
        checkpoints.check_settings(
            checkpoint, lora_args.lora_r, lora_args.lora_alpha, lora_args.lora_target_modules
        )
    check_folder(Path(model_args.model_name_or_path))
    quantization, reason = resolve_quantization(model_args.quantization)
    tell(args, *args.notes, reason)

    template = Template(load_tokenizer(model_args.model_name_or_path), model_args.template)
    rows, held_out = load_data(data_args, args, template)

    base = load_base(model_args.model_name_or_path, quantization, args.compute_dtype, args.device)
    base.config.use_cache = False
    model = adapter.attach(
        base,
        lora_args.lora_r,
        lora_args.lora_alpha,
        lora_args.lora_dropout,
        lora_args.lora_target_modules,
    )
    trainable, total = model.get_nb_trainable_parameters()
    tell(args, f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%})")

    args.eval_on_start = held_out is not None and not checkpoint
    trainer = LoraTrainer(model, args, template, rows, held_out)
    if checkpoint:
        tell(args, f"resuming from {checkpoint}")
    elif args.should_save:
        checkpoints.clear(args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    if held_out is not None:
        trainer.evaluate()
    summary = trainer.summary(quantization)

    if args.should_save:
        adapter.save(model, template, args.output_dir)
        trainer.state.save_to_json(f"{args.output_dir}/trainer_state.json")
        Path(args.output_dir, "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    tell(args, f"the adapter is complete and verified: {args.output_dir}")


def load_data(data_args, args, template):
    """The rows to train on and those to measure on, None without held-out data."""
    from llama_lora.train.examples import hold_out, load_examples
    from llama_lora.train.packing import Rows

    def load(path):
        examples, audit = load_examples(path, template, data_args.model_max_length)
        tell(args, f"{path}: {audit}")
        return examples

    examples, held_out = load(data_args.data_path), []
    if data_args.eval_data_path:
        held_out = load(data_args.eval_data_path)
    elif data_args.eval_ratio:
        examples, held_out = hold_out(examples, data_args.eval_ratio, args.seed)

    def arrange(examples):
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return Rows(examples, data_args.model_max_length, data_args.packing, step, args.seed)

    rows = arrange(examples)
    tell(args, f"{len(examples):,} examples in {len(rows):,} rows, {rows.fill:.1%} full")
    if not held_out:
        return rows, None
    tell(args, f"{len(held_out):,} examples held out")
    return rows, arrange(held_out)


def tell(args, *lines):
    """Print once, whatever the number of processes."""
    if args.process_index == 0:
        print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    main(*parse_args())
