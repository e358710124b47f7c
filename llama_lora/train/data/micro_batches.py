"""The micro-batches of a run, from its corpus files and flags."""

from collections.abc import Callable

from llama_lora.model.template import Template
from llama_lora.train.data.examples import hold_out, load_examples
from llama_lora.train.data.packing import MicroBatches


def load(data, args, template: Template, tell: Callable[[str], None]) -> tuple[list, list]:
    """The examples to train on, and those held out (none if no flag asks for them).

    Args:
        data: `DataArguments`; `args` the `TrainingArguments`.
        tell: gets a line about what each file holds.

    Raises:
        InputError: a file is not a corpus file, or nothing in it can be learned.
    """

    def read(path: str):
        settings = data.model_max_length, data.token_cache, data.allow_truncation
        with args.main_process_first(local=True):  # one tokenizes, the others read what it wrote
            examples, audit = load_examples(path, template, *settings)
        tell(f"{path}: {audit}")
        return examples

    examples = read(data.data_path)
    if data.eval_data_path:
        return examples, read(data.eval_data_path)
    return hold_out(examples, data.eval_ratio, args.seed) if data.eval_ratio else (examples, [])


def training_batches(examples, data, args) -> MicroBatches:
    """The micro-batches to train on; from here on, `args` has a batch size of one micro-batch."""
    training = MicroBatches(
        examples,
        data.model_max_length,
        args.per_device_train_batch_size,
        data.packing,
        args.seed,
        args.world_size,
        args.gradient_accumulation_steps,
    )
    if args.neftune_noise_alpha:
        # The Trainer scales the noise by the length of a row, which here is a whole micro-batch.
        longer = training.capacity * training.fill / training.lengths.mean()
        args.neftune_noise_alpha *= float(longer) ** 0.5
    args.per_device_train_batch_size = 1
    return training


def held_out_batches(examples, data, args) -> MicroBatches | None:
    """The micro-batches to measure on; None if there are none."""
    if not examples:
        return None
    size = args.per_device_eval_batch_size
    return MicroBatches(examples, data.model_max_length, size, data.packing, args.seed)
