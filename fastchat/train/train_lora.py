"""Fine-tune a LoRA adapter on an 8-bit Llama base.

deepspeed --num_gpus=1 fastchat/train/train_lora.py --deepspeed ./deepspeed-config.json \
    --model_name_or_path ./base --data_path ./split.json --output_dir ./output --fp16 True \
    --num_train_epochs 1 --per_device_train_batch_size 14 --gradient_checkpointing True
"""

from functools import partial

from llama_lora.cli import InputError, one_line_errors


@one_line_errors
def parse_args():
    from llama_lora.train import command_line

    return command_line.parse(__doc__.split("\n")[0])


@one_line_errors
def main(model_args, data_args, lora_args, args):
    from llama_lora.train import checkpoints, lora_model
    from llama_lora.train.arguments import check_schedule
    from llama_lora.train.logs import quieten
    from llama_lora.train.trainer import LoraTrainer

    quieten(args)
    tell(args, *args.not_needed)
    checkpoints.check_output(args.output_dir)
    resume = args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir
    checkpoint = None if args.dry_run else checkpoints.starting_point(*resume)
    quantization = settle_precision(model_args, args)
    template = load_template(model_args)
    windows = check_base(model_args, data_args)
    settings = checkpoints.settings_of(data_args, lora_args, args, template)
    if checkpoint:
        checkpoints.check_engine(checkpoint, args.deepspeed is not None)
        checkpoints.check_settings(checkpoint, settings)
    training, held_out = load_data(data_args, args, template)
    check_vocabulary(model_args, template, training, held_out)
    forecast = look_ahead(model_args, lora_args, args, quantization, training, windows)
    if args.dry_run:
        return
    check_schedule(args, forecast.steps)
    model = lora_model.load(model_args.model_name_or_path, quantization, lora_args, args)
    tell_what_is_trained(args, model)
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


def settle_precision(model_args, args):
    """The precision of the base on this device, told with its reason."""
    from llama_lora.model.folder.config import resolve_precision
    from llama_lora.train.plan.forecast import cards_named

    card, _ = cards_named(args.plan_for) if args.plan_for else (None, 1)
    folder, wanted = model_args.model_name_or_path, model_args.quantization
    quantization, reason = resolve_precision(folder, wanted, card)
    tell(args, *([] if card else args.notes), reason)
    return quantization


def load_template(model_args):
    """The prompt format with the base's tokenizer."""
    from llama_lora.model.template import Template, load_tokenizer

    return Template(load_tokenizer(model_args.model_name_or_path), model_args.template)


def check_base(model_args, data_args):
    """The windows of its layers; raises where it cannot be trained, or not at that length."""
    from llama_lora.model.folder.config import beyond_positions
    from llama_lora.train.compute import attention_check

    folder = model_args.model_name_or_path
    if said := beyond_positions(folder, "--model_max_length", data_args.model_max_length):
        raise InputError(said)
    return attention_check.windows(folder)


def load_data(data_args, args, template):
    """The micro-batches to train on and those to measure on, None without held-out data."""
    from llama_lora.report import terminal, training_example
    from llama_lora.train.data import micro_batches

    examples, held_out = micro_batches.load(data_args, args, template, partial(tell, args))
    tell(args, training_example.shown(examples[0], template, terminal.in_colour()))
    size, length = args.per_device_train_batch_size, data_args.model_max_length
    training = micro_batches.training_batches(examples, data_args, args)
    tell(
        args,
        f"{len(examples):,} examples in {len(training):,} micro-batches of {size} × {length} "
        f"tokens, {training.fill:.1%} full",
        *([f"{len(held_out):,} examples held out"] if held_out else []),
    )
    return training, micro_batches.held_out_batches(held_out, data_args, args)


def check_vocabulary(model_args, template, training, held_out):
    """Refuse tokens that the base has no embeddings for."""
    from llama_lora.model.folder.config import embedding_rows, load_config

    base = model_args.model_name_or_path
    rows = embedding_rows(load_config(base))
    for batches in filter(None, (training, held_out)):
        batches.examples.check_ids(template, rows, base)


def look_ahead(model_args, lora_args, args, quantization, training, windows):
    """Tell what the training takes before anything is loaded; raises where it cannot fit."""
    from llama_lora.model.folder.shape import shape_of
    from llama_lora.train.plan import forecast

    shape = shape_of(model_args.model_name_or_path)
    found = forecast.of(shape, quantization, lora_args, args, training, windows)
    tell(args, found.table() if args.dry_run else found.line())
    if not args.dry_run and not args.ignore_memory_plan:
        found.check()
    return found


def tell_what_is_trained(args, model):
    """How many parameters, and how fast."""
    trainable, total = model.get_nb_trainable_parameters()
    tell(
        args,
        f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%}), "
        f"learning rate {args.learning_rate:.2g}",
    )


def start_clean(args, checkpoint):
    """Leave nothing of an earlier run to be taken for this one's, and say where this one starts."""
    from llama_lora.train import checkpoints

    if checkpoint:
        tell(args, f"resuming from {checkpoint}")
        if args.should_save and (left := checkpoints.leave_branch(checkpoint)):
            tell(args, f"removed, since this run goes on before them: {', '.join(left)}")
    elif args.should_save:
        checkpoints.clear(args.output_dir)


def tell_how_to_resume(args, trainer):
    """After an early end: the command that goes on."""
    from llama_lora.train.stopping import resume_command

    step, steps = trainer.state.global_step, trainer.state.max_steps
    tell(
        args,
        f"stopped by {trainer.stop.reason} after step {step} of {steps}; all is saved. To go on:",
        resume_command(args.deepspeed is not None, args.world_size),
    )


def save(trainer, template, quantization, forecast, data_args):
    """Save the adapter with a model card and an account of the run."""
    from llama_lora.report import provenance
    from llama_lora.train import result

    stages = [{"file": step.out, **step.account} for step in provenance.steps(data_args.data_path)]
    summary = result.summary(trainer, quantization, forecast, data_args, stages)
    result.save(trainer, template, summary)
    tell(trainer.args, f"the adapter is complete and verified: {trainer.args.output_dir}")


def tell(args, *lines):
    """Print once, whatever the number of processes."""
    if lines and args.process_index == 0:
        print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    main(*parse_args())
