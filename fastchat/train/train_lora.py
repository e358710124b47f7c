"""Fine-tune a LoRA adapter on an 8-bit Llama base.

deepspeed --num_gpus=1 fastchat/train/train_lora.py --deepspeed ./deepspeed-config.json \
    --model_name_or_path ./base --data_path ./split.json --output_dir ./output --fp16 True \
    --num_train_epochs 1 --per_device_train_batch_size 14 --gradient_checkpointing True
"""

import json
import os
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
    from llama_lora.train.trainer import LoraTrainer, quieten

    quieten(args)
    checkpoint = None if args.dry_run else find_checkpoint(args)
    quantization = settle_precision(model_args, args)
    template = load_template(model_args)
    settings = check_settings(data_args, lora_args, args, template, checkpoint)
    training, held_out = load_data(data_args, args, template)
    forecast = look_ahead(model_args, lora_args, args, quantization, training)
    if args.dry_run:
        return
    model = load_model(model_args, lora_args, args, quantization)
    args.eval_on_start = held_out is not None and checkpoint is None
    trainer = LoraTrainer(
        model, args, template, training, held_out, settings, forecast.parts, forecast.part_tokens
    )
    start_clean(args, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stop.reason:
        tell_how_to_resume(args, trainer)
        return
    trainer.finish()
    save(trainer, template, quantization, forecast, data_args)


def find_checkpoint(args):
    """The checkpoint to resume from, None to start anew."""
    from llama_lora.train import checkpoints

    return checkpoints.starting_point(
        args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir
    )


def check_settings(data_args, lora_args, args, template, checkpoint):
    """The flags that a resumed run has in common with the one that began; checked."""
    from llama_lora.train import cache, checkpoints

    length = data_args.model_max_length
    settings = {
        "data_path": cache.key_of(data_args.data_path, template, length),
        "model_max_length": length,
        "packing": data_args.packing,
        "eval_ratio": data_args.eval_ratio,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_gpus": args.world_size,
        "seed": args.seed,
        "lora_r": lora_args.lora_r,
        "lora_alpha": lora_args.lora_alpha,
        "lora_target_modules": lora_args.lora_target_modules,
        "use_dora": lora_args.use_dora,
        "use_rslora": lora_args.use_rslora,
    }
    if checkpoint:
        checkpoints.check_settings(checkpoint, settings)
    return settings


def settle_precision(model_args, args):
    """The precision of the base on this device, told with its reason."""
    from llama_lora.model.hardware import resolve_quantization
    from llama_lora.train.forecast import cards_named

    card, _ = cards_named(args.plan_for) if args.plan_for else (None, 1)
    quantization, reason = resolve_quantization(model_args.quantization, card)
    tell(args, *([] if card else args.notes), reason)
    return quantization


def load_template(model_args):
    """The prompt format with the base's tokenizer."""
    from llama_lora.model.base import check_folder
    from llama_lora.model.template import Template, load_tokenizer

    check_folder(Path(model_args.model_name_or_path))
    return Template(load_tokenizer(model_args.model_name_or_path), model_args.template)


def load_data(data_args, args, template):
    """The micro-batches to train on and those to measure on, None without held-out data."""
    from llama_lora.report import example, terminal
    from llama_lora.train.examples import hold_out, load_examples
    from llama_lora.train.packing import MicroBatches

    def load(path):
        settings = data_args.model_max_length, data_args.token_cache, data_args.allow_truncation
        with args.main_process_first(local=True):  # it tokenizes, the others read what it wrote
            examples, audit = load_examples(path, template, *settings)
        tell(args, f"{path}: {audit}")
        return examples

    examples, held_out = load(data_args.data_path), []
    tell(args, example.shown(examples[0], template, terminal.in_colour()))
    if data_args.eval_data_path:
        held_out = load(data_args.eval_data_path)
    elif data_args.eval_ratio:
        examples, held_out = hold_out(examples, data_args.eval_ratio, args.seed)

    length, packing, seed = data_args.model_max_length, data_args.packing, args.seed
    training = MicroBatches(
        examples,
        length,
        args.per_device_train_batch_size,
        packing,
        seed,
        args.world_size,
        args.gradient_accumulation_steps,
    )
    if args.neftune_noise_alpha:
        # The Trainer scales the noise by the length of a row, which here is a whole micro-batch.
        longer = training.capacity * training.fill / training.lengths.mean()
        args.neftune_noise_alpha *= float(longer) ** 0.5
    # What follows takes micro-batches, not examples, one at a time.
    size, args.per_device_train_batch_size = args.per_device_train_batch_size, 1
    tell(
        args,
        f"{len(examples):,} examples in {len(training):,} micro-batches of {size} × {length} "
        f"tokens, {training.fill:.1%} full",
    )
    if not held_out:
        return training, None
    tell(args, f"{len(held_out):,} examples held out")
    return training, MicroBatches(held_out, length, args.per_device_eval_batch_size, packing, seed)


def look_ahead(model_args, lora_args, args, quantization, training):
    """Tell what the training takes before anything is loaded; raises where it cannot fit."""
    from llama_lora.model.shape import shape_of
    from llama_lora.train import forecast

    shape = shape_of(model_args.model_name_or_path)
    found = forecast.of(shape, quantization, lora_args, args, training)
    tell(args, found.table() if args.dry_run else found.line())
    if not args.dry_run and not args.ignore_memory_plan:
        found.check()
    return found


def load_model(model_args, lora_args, args, quantization):
    """The base with fresh LoRA matrices, its loss in chunks and its attention by example."""
    from transformers import set_seed

    from llama_lora.model import adapter
    from llama_lora.model.base import load_base
    from llama_lora.train import attention, loss
    from llama_lora.train.arguments import fitting_learning_rate

    base = load_base(model_args.model_name_or_path, quantization, args.compute_dtype, args.device)
    base.config.use_cache = False
    base.set_attn_implementation(attention.BY_EXAMPLE)
    loss.compute_in_chunks(base)
    set_seed(args.seed)  # the A matrices start at random
    model = adapter.attach(
        base,
        lora_args.lora_r,
        lora_args.lora_alpha,
        lora_args.lora_dropout,
        lora_args.lora_target_modules,
        use_dora=lora_args.use_dora,
        use_rslora=lora_args.use_rslora,
    )
    trainable, total = model.get_nb_trainable_parameters()
    args.learning_rate = args.learning_rate or fitting_learning_rate(base.config.hidden_size)
    tell(
        args,
        f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%}), "
        f"learning rate {args.learning_rate:.2g}",
    )
    return model


def start_clean(args, checkpoint):
    """Leave nothing of an earlier run to be taken for this one's, and say where this one starts."""
    from llama_lora.train import checkpoints

    if checkpoint:
        tell(args, f"resuming from {checkpoint}")
        if args.should_save and (left := checkpoints.leave_branch(checkpoint)):
            tell(args, f"removed, since this run goes on before them: {', '.join(left)}")
    elif args.should_save:
        checkpoints.clear(args.output_dir)
    tell(args, f"to stop early and lose nothing: kill -USR1 {os.getpid()}")


def tell_how_to_resume(args, trainer):
    """After an early end: the command that goes on."""
    from llama_lora.train.stop import resume_command

    step, steps = trainer.state.global_step, trainer.state.max_steps
    tell(
        args,
        f"stopped by {trainer.stop.reason} after step {step} of {steps}; all is saved. To go on:",
        resume_command(args.deepspeed is not None, args.world_size),
    )


def save(trainer, template, quantization, forecast, data_args):
    """Save the adapter, verify it, and leave an account of the run and a model card."""
    from llama_lora.model import adapter, model_card
    from llama_lora.report import flow
    from llama_lora.train import checkpoints

    args = trainer.args
    summary = {
        **trainer.summary(quantization),
        "planned": forecast.summary(),
        "settings": settings_told(data_args, args),
        "data": [{"file": step.out, **step.account} for step in flow.steps(data_args.data_path)],
    }
    folder = Path(args.output_dir)
    if args.should_save:
        with checkpoints.writing(folder):
            adapter.save(trainer.model, template, folder)
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            model_card.write(folder)
    tell(args, f"the adapter is complete and verified: {args.output_dir}")


def settings_told(data_args, args):
    """Flags by name, of which the adapter's evaluation needs those of the data."""
    told = (
        (data_args, ["data_path", "eval_data_path", "eval_ratio", "model_max_length"]),
        (args, ["learning_rate", "num_train_epochs", "gradient_accumulation_steps", "seed"]),
    )
    return {name: getattr(part, name) for part, names in told for name in names}


def tell(args, *lines):
    """Print once, whatever the number of processes."""
    if args.process_index == 0:
        print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    main(*parse_args())
