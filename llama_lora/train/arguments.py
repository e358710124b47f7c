"""The flags of training: ours, and Hugging Face's under the names that people have in scripts."""

import math
import os
import re
from dataclasses import dataclass, field

import torch
import transformers
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.utils import is_torch_tf32_available

from llama_lora.cli import InputError, UsageError
from llama_lora.hardware.device import (
    DTYPE_SWITCH,
    QUANTIZATIONS,
    compute_dtype,
    cores,
    device_name,
    dtype_name,
    switched_dtype,
)
from llama_lora.model.adapter import HUB_ID


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Folder of the base model."})
    template: str = field(
        default="vicuna_v1.1",
        metadata={
            "choices": ["vicuna_v1.1", "model"],
            "help": "Prompt format: Vicuna's, or the chat template in the base model's folder.",
        },
    )
    quantization: str = field(
        default="auto",
        metadata={
            "choices": list(QUANTIZATIONS),
            "help": "Precision of the frozen base; auto: 8bit, or what its folder stores.",
        },
    )


@dataclass
class DataArguments:
    data_path: str = field(metadata={"help": "Corpus file that the splitting stage wrote."})
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Corpus file to measure the held-out loss on."}
    )
    eval_ratio: float = field(
        default=0.0,
        metadata={"help": "Share of the conversations in --data_path to hold out, 0 to 0.5."},
    )
    model_max_length: int = field(
        default=512,
        metadata={"help": "Longest example in tokens; the rest is cut off, and counted."},
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Let short examples share a row; False: group them by length."},
    )
    allow_truncation: bool = field(
        default=False,
        metadata={
            "help": "Train although more of the answers than a twentieth is beyond the length."
        },
    )
    token_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder to keep tokens in from run to run, best on a local disk (default: "
            "$LLAMA_LORA_CACHE, or llama_lora in $XDG_CACHE_HOME or ~/.cache)."
        },
    )


@dataclass
class LoraArguments:
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale; updates grow by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before each A matrix."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Linear layers that get LoRA matrices: their names, or all-linear."},
    )
    use_dora: bool = field(
        default=False,
        metadata={
            "help": "Learn the norm of each weight column separately (DoRA, Liu et al. 2024)."
        },
    )
    use_rslora: bool = field(
        default=False,
        metadata={"help": "Scale by alpha / sqrt(r) (rank-stabilized LoRA, Kalajdzievski 2023)."},
    )

    def __post_init__(self):
        # alpaca-lora has them as '[q_proj,v_proj]'.
        self.lora_target_modules = re.findall(r"[\w.-]+", " ".join(self.lora_target_modules))


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, and flags that version 5 renamed, with the meaning they had."""

    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate; by default one chosen by the base's size."},
    )
    lr_scheduler_type: str = field(
        default="cosine",
        metadata={
            "choices": [kind.value for kind in SchedulerType],
            "help": "How the learning rate falls: cosine, linear, …",
        },
    )
    warmup_ratio: float = field(
        default=0.03, metadata={"help": "Share of all steps in which the learning rate rises."}
    )
    per_device_train_batch_size: str = field(
        default="4",
        metadata={
            "help": "A micro-batch on a card, in units of --model_max_length; auto: 4, computed in "
            "as many parts as the card's memory needs."
        },
    )
    per_device_eval_batch_size: int = field(
        default=4,
        metadata={"help": "Micro-batch when measuring, in units of --model_max_length."},
    )
    logging_steps: float = field(default=1, metadata={"help": "Steps between two log lines."})
    logging_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that tensorboard reads (default: runs/… in --output_dir)."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start over even if --output_dir holds checkpoints."}
    )
    base_name: str | None = field(
        default=None,
        metadata={
            "help": "Id on the Hub by which the adapter names its base, owner/name (default: the "
            "absolute path of --model_name_or_path)."
        },
    )
    gradient_checkpointing: str = field(
        default="auto",
        metadata={
            "choices": ["True", "False", "auto"],
            "nargs": "?",
            "const": "True",
            "help": "Recompute activations in the backward pass; auto: in as few layers as memory "
            "allows.",
        },
    )
    loraplus_lr_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of B over that of A (LoRA+, Hayou et al. 2024), such as 16."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "End after this many evaluations in a row without a lower loss."},
    )
    max_hours: float | None = field(
        default=None,
        metadata={"help": "Save and end before this many hours since the start are over."},
    )

    dry_run: bool = field(
        default=False,
        metadata={"help": "Only estimate memory and time; load no weights."},
    )
    plan_for: str | None = field(
        default=None,
        metadata={
            "help": "With --dry_run: a card that is not here: T4, 2xT4, P100, … or a size, 16GiB."
        },
    )
    ignore_memory_plan: bool = field(
        default=False, metadata={"help": "Start even if the memory plan says that it cannot fit."}
    )
    offload_activations: str = field(
        default="auto",
        metadata={
            "choices": ["True", "False", "auto"],
            "help": "Keep what layers recompute from in the host's memory; auto: if the card's is "
            "too small for it.",
        },
    )
    mlp_tiles: str = field(
        default="auto",
        metadata={
            "help": "Pieces of a micro-batch that the MLPs of recomputed layers take one by one; "
            "auto: of 2048 tokens."
        },
    )

    def __post_init__(self):
        self.in_parts = self.per_device_train_batch_size == "auto"
        self.per_device_train_batch_size = rows(self.per_device_train_batch_size)
        if self.in_parts:  # one micro-batch a step, in parts that are added up
            self.per_device_train_batch_size *= self.gradient_accumulation_steps
            self.gradient_accumulation_steps = 1
        if self.warmup_ratio and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # below 1 it is a share of the steps
        self.recompute, self.gradient_checkpointing = self.gradient_checkpointing, None
        in_json = isinstance(self.deepspeed, str) and self.deepspeed.startswith("{")
        if self.deepspeed and not in_json and not os.path.isfile(self.deepspeed):
            raise ValueError(
                f"--deepspeed {self.deepspeed}: no such file; what this project brings is "
                "./deepspeed-config.json"
            )
        if self.use_cpu and torch.cuda.is_available():
            raise ValueError("--use_cpu True: hide the card: CUDA_VISIBLE_DEVICES= python3 …")
        # Without it accelerate sees one process on machines that have no card, however many run.
        self.use_cpu = not torch.cuda.is_available()
        # DeepSpeed refuses fp16 on a P100 otherwise, which computes it without tensor cores.
        os.environ.setdefault("DS_ALLOW_DEPRECATED_FP16", "1")
        self.remove_unused_columns = False
        self.train_sampling_strategy = "sequential"  # the rows come in the order to train on
        self.prediction_loss_only = True
        self.disable_tqdm = True
        self.logging_nan_inf_filter = False  # a loss that is no number ends the run
        self.dataloader_pin_memory = not self.use_cpu
        if self.use_cpu and "OMP_NUM_THREADS" not in os.environ:
            # Each process would start a thread for every core, and they would wait for one another.
            threads = max(1, cores() // int(os.environ.get("WORLD_SIZE", 1)))
            os.environ["OMP_NUM_THREADS"] = str(threads)
            torch.set_num_threads(threads)
        self.notes = self._settle_precision()
        if self.tf32 and not is_torch_tf32_available():
            self.tf32 = None
            self.notes.append(f"--tf32 True: not on {device_name()}; training goes on without")
        if self.logging_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        super().__post_init__()
        if self.n_gpu > 1:
            # The Trainer would split batches over threads, which a quantized base does not survive.
            self._n_gpu = 1
            self.notes.append(f"using one card; deepspeed --num_gpus={torch.cuda.device_count()} …")

    def _settle_precision(self) -> list[str]:
        """Set fp16 and bf16 to what this machine computes in; say so where that was not asked."""
        if self.fp16 and self.bf16:
            raise ValueError("--fp16 True --bf16 True: expected one of them")
        fastest, switched = compute_dtype(), switched_dtype()
        asked = torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else fastest
        on_card = asked == torch.float16 and torch.cuda.is_available()
        possible = asked == fastest or (on_card and not switched)
        self.compute_dtype = asked if possible else fastest
        self.fp16 = self.compute_dtype == torch.float16
        self.bf16 = self.compute_dtype == torch.bfloat16
        if possible:
            return []
        names = {torch.float16: "--fp16", torch.bfloat16: "--bf16"}
        used = dtype_name(self.compute_dtype)
        why = f"{DTYPE_SWITCH} is set" if switched else f"not on {device_name()}"
        return [f"{names[asked]} True: {why}; training in {used} instead"]


def rows(text: str) -> int:
    """`--per_device_train_batch_size` as a number."""
    default = TrainingArguments.__dataclass_fields__["per_device_train_batch_size"].default
    number = default if text == "auto" else str(text)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"--per_device_train_batch_size {text}: expected auto or a number from 1")
    return int(number)


def fitting_learning_rate(hidden_size: int) -> float:
    """A learning rate for LoRA on a Llama base (Schulman et al., LoRA Without Regret, 2025).

    Ten times that of full fine-tuning, falling with the width, whatever the rank.
    """
    return 5e-5 * 10 * (2000 / hidden_size) ** 0.781


def check(model, data, lora, training) -> None:
    """Raise `UsageError` with a line for every flag outside its range."""
    held_out = bool(data.eval_data_path or data.eval_ratio)
    faults = {
        f"--eval_ratio {data.eval_ratio}: expected 0 to 0.5": 0 <= data.eval_ratio <= 0.5,
        f"--model_max_length {data.model_max_length}: expected at least 16": (
            data.model_max_length >= 16
        ),
        f"--lora_r {lora.lora_r}: expected at least 1": lora.lora_r >= 1,
        "--lora_target_modules: expected names of layers": bool(lora.lora_target_modules),
        f"--lora_dropout {lora.lora_dropout}: expected 0 to below 1": 0 <= lora.lora_dropout < 1,
        f"--learning_rate {training.learning_rate}: expected a number above 0": (
            training.learning_rate is None or 0 < training.learning_rate < math.inf
        ),
        f"--num_train_epochs {training.num_train_epochs}: expected a number above 0": (
            training.num_train_epochs > 0 or training.max_steps > 0
        ),
        f"--gradient_accumulation_steps {training.gradient_accumulation_steps}: expected at "
        "least 1": training.gradient_accumulation_steps >= 1,
        f"--per_device_eval_batch_size {training.per_device_eval_batch_size}: expected at "
        "least 1": training.per_device_eval_batch_size >= 1,
        f"--seed {training.seed}: expected 0 to 2^32 - 1": 0 <= training.seed < 2**32,
        "--save_strategy best: expected no, steps or epoch; the best adapter is kept anyway": (
            training.save_strategy != SaveStrategy.BEST
        ),
        "--eval_strategy: needs --eval_data_path or --eval_ratio": (
            held_out or training.eval_strategy == IntervalStrategy.NO
        ),
        "--early_stopping_patience: needs --eval_strategy steps or epoch": (
            training.early_stopping_patience is None
            or training.eval_strategy != IntervalStrategy.NO
        ),
        "--plan_for: needs --dry_run True": training.dry_run or training.plan_for is None,
        f"--mlp_tiles {training.mlp_tiles}: expected auto or a number from 1": (
            training.mlp_tiles == "auto"
            or (training.mlp_tiles.isdecimal() and int(training.mlp_tiles) >= 1)
        ),
        "--offload_activations True: needs --gradient_checkpointing True or auto": (
            training.offload_activations != "True" or training.recompute != "False"
        ),
        "several processes: need --deepspeed ./deepspeed-config.json": (
            training.world_size == 1 or training.deepspeed is not None
        ),
        f"--base_name {training.base_name}: expected an id on the Hub, owner/name": (
            training.base_name is None or HUB_ID.fullmatch(training.base_name)
        ),
        "fp16 under DeepSpeed: not on this CPU; train with python3, or in another dtype": (
            not training.fp16 or training.deepspeed is None or _deepspeed_runs_fp16()
        ),
        "--lora_target_modules lm_head: the head stays frozen": (
            "lm_head" not in lora.lora_target_modules
        ),
    }
    known, installed = set(INTEGRATION_TO_CALLBACK), set(get_available_reporting_integrations())
    for tool in training.report_to:
        faults[f"--report_to {tool}: expected one of {', '.join(sorted(known))}"] = tool in known
        get = f"; pip install {tool}" if tool in ("tensorboard", "wandb") else ""
        faults[f"--report_to {tool}: not installed{get}"] = tool not in known - installed
    if broken := [fault for fault, holds in faults.items() if not holds]:
        raise UsageError(*broken)


def check_schedule(training, steps: int) -> None:
    """Raise `InputError` where the learning rate is 0 in all of the `steps`: in the only one."""
    if steps > 1:
        return
    warm_up = training.get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    kind, options = training.lr_scheduler_type, training.lr_scheduler_kwargs
    transformers.get_scheduler(kind, optimizer, warm_up, steps, options)
    if optimizer.param_groups[0]["lr"] == 0:
        raise InputError(
            "the only step has a learning rate of 0, by the warm-up, and the adapter would learn "
            "nothing: take more steps, or --warmup_ratio 0 and no --warmup_steps"
        )


def _deepspeed_runs_fp16() -> bool:
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())
