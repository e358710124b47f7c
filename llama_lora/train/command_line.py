"""The command line of training: its help in groups, and a line for each fault."""

import argparse
import difflib
import json
import re
import sys

from transformers import HfArgumentParser

from llama_lora.cli import UsageError
from llama_lora.options import Help
from llama_lora.train import arguments, foreign_flags

# The flags that are told first, in their order. Those with a text here are transformers' own.
GROUPS: dict[str, dict[str, str]] = {
    "model": {"model_name_or_path": "", "template": "", "quantization": ""},
    "data": {
        "data_path": "",
        "eval_data_path": "",
        "eval_ratio": "",
        "model_max_length": "",
        "packing": "",
        "allow_truncation": "",
        "token_cache": "",
    },
    "LoRA": {
        "lora_r": "",
        "lora_alpha": "",
        "lora_dropout": "",
        "lora_target_modules": "",
        "use_dora": "",
        "use_rslora": "",
        "loraplus_lr_ratio": "",
    },
    "training": {
        "num_train_epochs": "Passes over the corpus.",
        "max_steps": "Steps to train, whatever --num_train_epochs says; -1: those of the epochs.",
        "per_device_train_batch_size": "",
        "gradient_accumulation_steps": "Micro-batches per card and step.",
        "learning_rate": "",
        "lr_scheduler_type": "",
        "warmup_ratio": "",
        "weight_decay": "Share of a weight that each step subtracts, times the learning rate.",
        "max_grad_norm": "Largest gradient norm; a larger one is scaled down to it.",
        "optim": "Optimizer: adamw_torch_fused, adamw_8bit, adafactor, …",
        "neftune_noise_alpha": "Noise on the embeddings (NEFTune, Jain et al. 2023), such as 5.",
        "seed": "Seed of the data's order and of the initial matrices.",
        "fp16": "Compute in float16; without it and --bf16, in the device's fastest dtype.",
        "bf16": "Compute in bfloat16.",
        "deepspeed": "Settings for runs that deepspeed starts: ./deepspeed-config.json.",
    },
    "held-out loss": {
        "eval_strategy": "When to measure it, besides before and after training.",
        "eval_steps": "Steps between two measurements, or a share of all steps below 1 (default: "
        "--logging_steps).",
        "per_device_eval_batch_size": "",
        "early_stopping_patience": "",
    },
    "memory and time": {
        "gradient_checkpointing": "",
        "offload_activations": "",
        "mlp_tiles": "",
        "ignore_memory_plan": "",
        "dry_run": "",
        "plan_for": "",
    },
    "saving and resuming": {
        "output_dir": "For the adapter and its checkpoints (default: trainer_output).",
        "base_name": "",
        "save_strategy": "When to save a checkpoint.",
        "save_steps": "Steps between two checkpoints, or a share of all steps below 1.",
        "save_total_limit": "Checkpoints to keep, the newest (default: all).",
        "resume_from_checkpoint": "Resume from the newest checkpoint (True; auto: if there is one) "
        "or from the one in that folder.",
        "overwrite_output_dir": "",
        "max_hours": "",
    },
    "log": {
        "logging_steps": "",
        "report_to": "Another tool that gets the log: tensorboard, wandb, …",
        "run_name": "Name of the run there.",
        "logging_dir": "",
    },
}
VALUES = {
    "base_name": "NAME",
    "data_path": "FILE",
    "deepspeed": "FILE",
    "eval_data_path": "FILE",
    "logging_dir": "FOLDER",
    "lora_target_modules": "NAME",
    "lr_scheduler_type": "NAME",
    "mlp_tiles": "auto|N",
    "model_name_or_path": "FOLDER",
    "optim": "NAME",
    "output_dir": "FOLDER",
    "per_device_train_batch_size": "auto|N",
    "plan_for": "CARD",
    "report_to": "TOOL",
    "resume_from_checkpoint": "True|auto|FOLDER",
    "run_name": "NAME",
    "save_strategy": "no|steps|epoch",
    "token_cache": "FOLDER",
}
OTHERS = "others of transformers.TrainingArguments, in its words"
USAGE = "deepspeed --num_gpus=1 %(prog)s --flag value …, or python3 %(prog)s --flag value …"
EPILOG = f"""\
All {OTHERS.split(",")[0]} are accepted too: --help_all
Names that FastChat and alpaca-lora have for these (--base_model, --cutoff_len, --q_lora, …) are
taken as such; other flags of theirs are answered in a line that says what does it here."""


def parse(description: str):
    """The flags given, as the four classes of `arguments`.

    Raises:
        UsageError: a line for each that cannot be.
    """
    parser = Parser(description)
    try:
        parsed = parser.parse_args_into_dataclasses()
    except json.JSONDecodeError as error:
        raise UsageError(f"{error.doc}: expected JSON: {error.msg}") from error
    except OSError as error:
        raise UsageError(
            f"{error.filename}: {error.strerror}" if error.filename else str(error)
        ) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    arguments.check(*parsed)
    parsed[-1].not_needed = parser.not_needed
    return parsed


class Parser(HfArgumentParser):
    """Takes flags of other scripts as `foreign_flags` has them, and no abbreviations.

    Attributes:
        not_needed: a line for each of those that make no difference here.
    """

    def __init__(self, description: str):
        classes = (
            arguments.ModelArguments,
            arguments.DataArguments,
            arguments.LoraArguments,
            arguments.TrainingArguments,
        )
        super().__init__(
            classes,
            description=description,
            formatter_class=InGroups,
            allow_abbrev=False,
            exit_on_error=False,
        )
        self.add_argument("--help_all", action=HelpAll, help="show every flag, and end")
        self.not_needed: list[str] = []

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, with nothing left over.

        Raises:
            UsageError: a line for each fault; of bad values for the first alone.
        """
        words = sys.argv[1:] if args is None else args
        words, self.not_needed, faults = foreign_flags.translated(words)
        known = []
        for group in foreign_flags.by_flag(words):
            flag, _ = foreign_flags.parts(group)
            if flag and flag not in self._option_string_actions:
                faults.append(self._unknown(flag))
            else:
                known += group
        try:
            namespace, left = super().parse_known_args(known, namespace)
            faults += [f"{word}: belongs to no flag" for word in left]
        except argparse.ArgumentError as error:
            faults.append(_brief(error))
        if faults:
            raise UsageError(*faults)
        return namespace, []

    def _unknown(self, flag: str) -> str:
        name = flag.lstrip("-").replace("-", "_")
        first = [f"--{one}" for texts in GROUPS.values() for one in texts]
        near = (
            *difflib.get_close_matches(f"--{name}", first, 1),
            *(one for one in first if name in one),
            *difflib.get_close_matches(f"--{name}", self._option_string_actions, 1, cutoff=0.8),
        )
        return f"{flag}: no such flag" + (f"; did you mean {near[0]}?" if near else "")

    def error(self, message: str):
        raise argparse.ArgumentError(None, message)

    def format_help(self, every: bool = False) -> str:
        """The flags in `GROUPS`, and with `every` all others."""
        actions = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)  # `--no_packing` comes after `--packing`
        groups = {}
        for title, texts in GROUPS.items():
            groups[title] = [actions.pop(name) for name in texts]
            for action in groups[title]:
                action.help = texts[action.dest] or action.help
        if every:
            groups[OTHERS] = [
                action for name, action in actions.items() if name not in foreign_flags.ANSWERED
            ]
        formatter = self._get_formatter()
        formatter.add_usage(USAGE, [], [])
        formatter.add_text(self.description)
        for title, shown in groups.items():
            formatter.start_section(title)
            formatter.add_arguments(shown)
            formatter.end_section()
        formatter.add_text("" if every else EPILOG)
        return formatter.format_help()


class HelpAll(argparse.Action):
    def __init__(self, **kwargs):
        super().__init__(**kwargs, nargs=0, default=argparse.SUPPRESS)

    def __call__(self, parser, *_):
        print(parser.format_help(every=True), end="")
        parser.exit()


class InGroups(Help):
    """Names a flag in one spelling, and what it takes."""

    def _format_action_invocation(self, action) -> str:
        flag = next((name for name in action.option_strings if name[:2] == "--"), "")
        return " ".join(filter(None, (flag, _values(action))))

    def _get_help_string(self, action) -> str:
        if isinstance(action.default, list) and action.default:
            return f"{action.help} (default: {' '.join(action.default)})"
        return super()._get_help_string(action)


def _values(action) -> str:
    """What a flag takes, in a word."""
    if action.nargs == 0:
        return ""
    if action.dest in VALUES:
        return VALUES[action.dest]
    if action.choices:
        return "|".join(map(str, action.choices))
    kind = getattr(action.type, "__name__", "")
    return {"int": "N", "float": "X", "string_to_bool": "True|False"}.get(kind, "…")


def _brief(error: argparse.ArgumentError) -> str:
    """What argparse says of an argument, under the first of its names alone."""
    name = f"{error.argument_name}: " if error.argument_name else ""
    return re.sub(r"(--\w+)(/--[\w-]+)+", r"\1", name + error.message)
