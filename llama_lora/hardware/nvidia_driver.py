"""What the NVIDIA driver says, also of cards that torch cannot use."""

import os
import shutil
import subprocess


def ask(field: str) -> list[str]:
    """A field of nvidia-smi for each card; nothing without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def first_card() -> tuple[str, tuple[int, int]] | None:
    """Name and capability of the driver's first card; None if there is none or it is hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    names, numbers = ask("name"), ask("compute_cap")
    return (names[0], tuple(map(int, numbers[0].split(".")))) if names and numbers else None
