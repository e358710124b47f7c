"""Which state a run starts from: nothing is resumed or overwritten without being asked for."""

import json
import re
import shutil
from pathlib import Path

from llama_lora.cli import InputError
from llama_lora.model.adapter import WEIGHTS

NUMBERED = re.compile(r"checkpoint-(\d+)")


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
    for name in (WEIGHTS, "summary.json", "trainer_state.json"):
        (Path(output_dir) / name).unlink(missing_ok=True)


def check_settings(checkpoint: str, r: int, alpha: int, targets: list[str]) -> None:
    """Raise `InputError` where a checkpoint was trained with another shape of adapter."""
    saved = json.loads((Path(checkpoint) / "adapter_config.json").read_text())
    for flag, name, now in (("r", "r", r), ("alpha", "lora_alpha", alpha)):
        if saved[name] != now:
            raise InputError(
                f"--lora_{flag} {now}: {checkpoint} was trained with {saved[name]}; "
                "resume with the flags of the run that wrote it"
            )
    if targets != ["all-linear"] and set(saved["target_modules"]) != set(targets):
        raise InputError(
            f"--lora_target_modules {' '.join(targets)}: {checkpoint} was trained with "
            f"{' '.join(sorted(saved['target_modules']))}"
        )


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a checkpoint written to its end: the trainer's state is written last."""
    try:
        step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (folder / WEIGHTS).is_file() and step > 0


def _checkpoints(output_dir: str):
    folder = Path(output_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := NUMBERED.fullmatch(path.name)) and path.is_dir():
            yield int(match[1]), path
