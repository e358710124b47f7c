"""Which state a run starts from: nothing is resumed or overwritten unless asked for."""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from llama_lora.cli import InputError, LocalError
from llama_lora.model.adapter import WEIGHTS
from llama_lora.train import logs
from llama_lora.train.data import token_cache

NUMBERED = re.compile(r"checkpoint-(\d+)")
SETTINGS = "settings.json"
BEST = "best_adapter"  # beside the checkpoints
COMPLETE = "complete"  # written when every process has written all of its files
NO_ROOM = re.compile(r"No space left|Disk quota|File too large|failed writing|enforce fail", re.I)


def starting_point(output_dir: str, resume: str | None, overwrite: bool) -> str | None:
    """The checkpoint folder to resume from, or None for a new start.

    Args:
        resume: "True" for the newest complete checkpoint in `output_dir`; "auto" for the same, or
            for a new start if there is none; "False" or None for a new start; or the path of a
            checkpoint.

    Raises:
        InputError: checkpoints exist and no flag says what to do, or none can be resumed.
    """
    wanted = (resume or "false").lower()
    found = sorted(_checkpoints(output_dir), reverse=True)
    complete = next((str(folder) for _, folder in found if is_complete(folder)), None)
    if wanted == "false":
        if overwrite:
            return None
        if found:
            raise InputError(
                f"{output_dir}: holds checkpoints, the newest {found[0][1].name}; to resume pass "
                "--resume_from_checkpoint True, to start over --overwrite_output_dir True"
            )
        if (Path(output_dir) / WEIGHTS).exists():
            raise InputError(
                f"{output_dir}: holds a finished adapter; "
                "to replace it pass --overwrite_output_dir True"
            )
        return None
    if wanted == "auto":
        return complete
    if wanted == "true":
        if complete is None:
            raise InputError(
                f"--resume_from_checkpoint {resume}: no complete checkpoint in {output_dir}"
            )
        return complete
    if not is_complete(Path(resume)):
        raise InputError(f"--resume_from_checkpoint {resume}: not a complete checkpoint folder")
    return resume


def check_output(output_dir: str) -> None:
    """Refuse a folder that holds a model: the adapter's tokenizer would replace the model's.

    Raises:
        InputError: it does.
    """
    if (Path(output_dir) / "config.json").is_file():
        raise InputError(
            f"--output_dir {output_dir}: holds a model, and the adapter's tokenizer and template "
            "would replace its own; choose another folder"
        )


def clear(output_dir: str) -> None:
    """Remove what an earlier run left, so that it is not taken for this run's."""
    for _, folder in _checkpoints(output_dir):
        _remove(folder)
    shutil.rmtree(Path(output_dir, BEST), ignore_errors=True)
    for name in (WEIGHTS, "summary.json", "trainer_state.json", logs.LOG, logs.PICTURE):
        (Path(output_dir) / name).unlink(missing_ok=True)


def settings_of(data, lora, args, template) -> dict:
    """The flags that a resumed run must share with the run that it continues.

    Args:
        data, lora, args: `DataArguments`, `LoraArguments` and `TrainingArguments`.
    """
    length = data.model_max_length
    return {
        "data_path": token_cache.key_of(data.data_path, template, length),
        "model_max_length": length,
        "packing": data.packing,
        "eval_ratio": data.eval_ratio,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_gpus": args.world_size,
        "seed": args.seed,
        "lora_r": lora.lora_r,
        "lora_alpha": lora.lora_alpha,
        "lora_target_modules": lora.lora_target_modules,
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }


def check_engine(checkpoint: str, deepspeed: bool) -> None:
    """Raise `InputError` if the optimizer's state in `checkpoint` is from the other engine.

    DeepSpeed and the Trainer keep it in files of their own, and neither reads the other's.
    """
    wrote = any(Path(checkpoint).glob("global_step*"))
    if wrote == deepspeed:
        return
    was, now = ("deepspeed", "python3") if wrote else ("python3", "deepspeed")
    raise InputError(
        f"{checkpoint} was written under {was}; a run under {now} would lose the states of its "
        f"optimizer and schedule; resume it with {was}, or start over with "
        "--overwrite_output_dir True"
    )


def check_settings(checkpoint: str, settings: dict) -> None:
    """Raise `InputError` that names the flags that differ from those of `checkpoint`.

    With another order of the data, or another shape of the adapter, it would be another run.
    """
    path = Path(checkpoint, SETTINGS)
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    differing = [
        f"--{flag} {_shown(now)} (was {_shown(saved.get(flag))})"
        for flag, now in settings.items()
        if saved.get(flag) != now
    ]
    if differing:
        raise InputError(
            f"{checkpoint} was made with other settings: {', '.join(differing)}; resume with the "
            "settings it was made with, or start over with --overwrite_output_dir True"
        )


def _shown(value) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a checkpoint that all processes have finished writing."""
    return (folder / COMPLETE).is_file() and (folder / WEIGHTS).is_file()


@contextmanager
def writing(path: Path, last: str = ""):
    """Context for writing `path`: a full disk ends in one line, which ends with `last`.

    Raises:
        LocalError: the disk is full.
    """
    try:
        yield
    except Exception as error:  # torch, safetensors and tokenizers each raise their own
        if not NO_ROOM.search(str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise LocalError(f"{path}: cannot be written: {reason}{last and '; ' + last}") from None


@contextmanager
def checkpoint(folder: Path, responsible: bool):
    """Context for writing a checkpoint, which does not count as complete until the end.

    Args:
        responsible: whether this process is the one to remove what could not be completed.

    Raises:
        LocalError: the disk is full.
    """
    (folder / COMPLETE).unlink(missing_ok=True)
    complete = [path for _, path in sorted(_checkpoints(folder.parent)) if is_complete(path)]
    last = (
        f"the last good checkpoint is {complete[-1]}"
        if complete
        else "there is no earlier checkpoint"
    )
    try:
        with writing(folder, last):
            yield
    except LocalError:
        if responsible:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def finish(folder: Path, settings: dict, limit: int | None) -> None:
    """Declare the checkpoint `folder` complete, and remove all but the newest `limit`.

    `settings` are the flags that a resumed run must share with the one that wrote it.
    """
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    os.sync()  # a checkpoint that a power cut left half on the disk must not be called complete
    (folder / COMPLETE).touch()
    if limit:
        for _, older in sorted(_checkpoints(folder.parent))[:-limit]:
            _remove(older)


def leave_branch(checkpoint: str) -> list[str]:
    """Remove the checkpoints after the one resumed from, which this run will not reach; names."""
    here = Path(checkpoint)
    match = NUMBERED.fullmatch(here.name)
    later = [
        path
        for number, path in sorted(_checkpoints(here.parent))
        if match and number > int(match[1])
    ]
    for path in later:
        _remove(path)
    return [path.name for path in later]


def _remove(folder: Path) -> None:
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(output_dir):
    folder = Path(output_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := NUMBERED.fullmatch(path.name)) and path.is_dir():
            yield int(match[1]), path
