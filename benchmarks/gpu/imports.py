"""Whether all that is measured with can be imported: told at once, not after a base is made."""

import importlib
import re
import sys
from importlib.metadata import PackageNotFoundError, version

# The oldest of each that this benchmark's parts work with.
OLDEST = {
    "torch": "2.11",
    "transformers": "5.23",
    "peft": "0.21",
    "bitsandbytes": "0.50",
    "accelerate": "1.15",
    "safetensors": "0.8",
    "numpy": "2.0",
    "psutil": "5.9",
}
OLDEST_PYTHON = 3, 11
PARTS = "gpu.base", "gpu.checks", "gpu.ours", "gpu.reference", "gpu.answers"


def found() -> dict:
    """What is missing, and otherwise whether there is a card."""
    lines = missing()
    if lines:
        return {"missing": lines}
    import torch

    return {"missing": [], "cuda": torch.cuda.is_available()}


def missing() -> list[str]:
    """A line for each package that is missing, too old or broken; empty where all is well."""
    found = [f"Python {sys.version.split()[0]}: expected 3.11 or newer"]
    found = found * (sys.version_info < OLDEST_PYTHON)
    found += [line for name, oldest in OLDEST.items() if (line := lacking(name, oldest))]
    return found or [line for part in PARTS if (line := broken(part))]


def lacking(name: str, oldest: str) -> str:
    try:
        here = version(name)
    except PackageNotFoundError:
        return f"{name}: not installed, expected {oldest} or newer"
    if numbers(here) < numbers(oldest):
        return f"{name} {here}: expected {oldest} or newer"
    return broken(name)


def broken(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a library that does not fit raises
        return f"{module} cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def numbers(version: str) -> tuple[int, ...]:
    """ "2.11.0+cu130" -> (2, 11, 0)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))
