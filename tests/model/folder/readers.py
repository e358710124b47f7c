"""Every script that reads a base, each as short as it goes, for what has to hold in all of them."""

from pathlib import Path

from tests.conftest import run_here, shipped
from tests.corpora import save

ON_CPU = ["--quantization", "none"]


def train(base: Path, folder: Path, *flags):
    """One step; the adapter is in `folder`/output."""
    return run_here(
        *("fastchat/train/train_lora.py", "--model_name_or_path", base),
        *("--data_path", corpus(folder), "--output_dir", folder / "output"),
        *(
            "--lora_r",
            4,
            "--max_steps",
            1,
            "--learning_rate",
            0.01,
            "--warmup_ratio",
            0,
            "--save_strategy",
            "no",
            "--model_max_length",
            256,
        ),
        *("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1),
        *(flags or ON_CPU),
    )


def generate(base: Path, *flags, ask: str = "Who are you?"):
    asked = ["--prompt", ask, "--max_new_tokens", 4, "--temperature", 0]
    return run_here("generate.py", "--base_model", base, *asked, *flags)


def evaluate(base: Path, folder: Path, *flags):
    measured = ["--data_path", corpus(folder), "--limit", 2, "--output_dir", folder / "evaluated"]
    return run_here("fastchat/eval/evaluate.py", "--base_model", base, *measured, *flags)


def merge(base: Path, lora: Path, folder: Path, *flags):
    """Into `folder`/merged."""
    return run_here(
        *("fastchat/model/merge_lora.py", "--base_model", base, "--lora_weights", lora),
        *("--output_dir", folder / "merged", *flags),
    )


def all_of(base: Path, lora: Path, folder: Path) -> dict:
    """What every script that loads a base's weights makes of it, by name."""
    adapted = ["--lora_weights", lora]
    return {
        "train": train(base, folder),
        "generate": generate(base, *adapted),
        "evaluate": evaluate(base, folder, *adapted),
        "merge": merge(base, lora, folder),
    }


def corpus(folder: Path) -> Path:
    path = folder / "split.json"
    return path if path.exists() else save(path, shipped("dummy_en.json")[:12])
