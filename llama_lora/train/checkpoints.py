"""Which state a run starts from: nothing is resumed or overwritten without being asked for."""

import json
import re
import shutil
from pathlib import Path

from llama_lora.cli import InputError

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
        if found and not overwrite:
            raise InputError(
                f"{output_dir}: holds checkpoints, the newest {found[0][1].name}; to go on pass "
                "--resume_from_checkpoint True, to start over --overwrite_output_dir True"
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
    """Remove the checkpoints of an earlier run, so that none of them is taken for this one's."""
    for _, folder in _checkpoints(output_dir):
        shutil.rmtree(folder)


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a checkpoint written to its end: the trainer's state is written last."""
    try:
        step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (folder / "adapter_model.safetensors").is_file() and step > 0


def _checkpoints(output_dir: str):
    folder = Path(output_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := NUMBERED.fullmatch(path.name)) and path.is_dir():
            yield int(match[1]), path
