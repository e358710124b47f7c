"""Which state a run starts from: nothing is resumed or overwritten without being asked for."""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from llama_lora.cli import InputError
from llama_lora.model.adapter import WEIGHTS
from llama_lora.train import best, logs

NUMBERED = re.compile(r"checkpoint-(\d+)")
COMPLETE = "complete"  # written when every process has written all of its files
NO_ROOM = re.compile(r"No space left|Disk quota|File too large|failed writing|enforce fail", re.I)


def starting_point(output_dir: str, resume: str | None, overwrite: bool) -> str | None:
    """The checkpoint folder to resume from, or None to start anew.

    Args:
        resume: "True" for the newest complete checkpoint in `output_dir`, "auto" for that or else
            a new start, "False" or None for a new start, or the path of a checkpoint.

    Raises:
        InputError: checkpoints exist and neither flag says what to do; or none can be resumed.
    """
    wanted = (resume or "false").lower()
    found = sorted(_checkpoints(output_dir), reverse=True)
    complete = next((str(folder) for _, folder in found if is_complete(folder)), None)
    if wanted == "false":
        if overwrite:
            return None
        if found:
            raise InputError(
                f"{output_dir}: holds checkpoints, the newest {found[0][1].name}; to go on pass "
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


def clear(output_dir: str) -> None:
    """Remove what an earlier run left, so that none of it is taken for this one's."""
    for _, folder in _checkpoints(output_dir):
        shutil.rmtree(folder)
    shutil.rmtree(Path(output_dir, best.FOLDER), ignore_errors=True)
    for name in (WEIGHTS, "summary.json", "trainer_state.json", logs.LOG, logs.PICTURE):
        (Path(output_dir) / name).unlink(missing_ok=True)


def check_settings(checkpoint: str, lora) -> None:
    """Raise `InputError` where a checkpoint was trained with another shape of adapter."""
    saved = json.loads((Path(checkpoint) / "adapter_config.json").read_text())
    now = {
        "r": ("lora_r", lora.lora_r),
        "lora_alpha": ("lora_alpha", lora.lora_alpha),
        "use_dora": ("use_dora", lora.use_dora),
        "use_rslora": ("use_rslora", lora.use_rslora),
    }
    for name, (flag, value) in now.items():
        if saved[name] != value:
            raise InputError(
                f"--{flag} {value}: {checkpoint} was trained with {saved[name]}; "
                "resume with the flags of the run that wrote it"
            )
    targets = lora.lora_target_modules
    if targets != ["all-linear"] and set(saved["target_modules"]) != set(targets):
        raise InputError(
            f"--lora_target_modules {' '.join(targets)}: {checkpoint} was trained with "
            f"{' '.join(sorted(saved['target_modules']))}"
        )


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a checkpoint that all processes have written to its end."""
    return (folder / COMPLETE).is_file() and (folder / WEIGHTS).is_file()


@contextmanager
def writing(folder: Path):
    """Around the writing of the checkpoint `folder`: a disk that is full ends in one line.

    Raises:
        InputError: no room; what was written of the checkpoint is removed.
    """
    try:
        yield
    except Exception as error:  # torch, safetensors and tokenizers each raise their own
        if not NO_ROOM.search(str(error)):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        complete = [path for _, path in sorted(_checkpoints(folder.parent)) if is_complete(path)]
        last = f"the last good checkpoint is {complete[-1]}" if complete else "there is none before"
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder}: cannot be written: {reason}; {last}") from None


def finish(folder: Path, limit: int | None) -> None:
    """Declare the checkpoint `folder` complete, and remove all but the newest `limit`."""
    (folder / COMPLETE).touch()
    if limit:
        for _, older in sorted(_checkpoints(folder.parent))[:-limit]:
            shutil.rmtree(older, ignore_errors=True)


def _checkpoints(output_dir):
    folder = Path(output_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := NUMBERED.fullmatch(path.name)) and path.is_dir():
            yield int(match[1]), path
