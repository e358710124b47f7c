"""Whether all that is measured with can be imported: told at once, not after a base is made."""

import importlib
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from benchmarks.gpu.reasons import first_line

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
FOR_SCRIPTS = "orjson", "datasets", "pyarrow", "matplotlib"
PARTS = (
    "benchmarks.gpu.workers.checks",
    *(f"benchmarks.gpu.contenders.{name}" for name in ("base", "ours", "reference", "answers")),
)


def missing() -> list[str]:
    """A line for each that is missing, too old or broken; empty where all is well."""
    found = [f"Python {sys.version.split()[0]}: expected 3.11 or newer"]
    found = found * (sys.version_info < OLDEST_PYTHON)
    found += [line for name, oldest in OLDEST.items() if (line := lacking(name, oldest))]
    found = found or [line for part in PARTS if (line := broken(part))]
    return found or [line for look in (kernels, library) if (line := look())]


def missing_for_scripts() -> list[str]:
    """Packages without which rows are measured, but train_lora.py and the like do not run."""
    return [name for name in FOR_SCRIPTS if find_spec(name) is None]


def kernels() -> str:
    """Whether torch is built for the card."""
    import torch

    from llama_lora.hardware.cards import has_kernels

    if not torch.cuda.is_available():
        return ""
    capability, built_for = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if has_kernels(built_for, capability):
        return ""
    wanted = ".".join(map(str, capability))
    return f"torch {torch.__version__}: no kernels for capability {wanted}, only {built_for}"


def library() -> str:
    """Whether bitsandbytes has kernels for this CUDA; it says nothing itself until they lack."""
    import torch
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        return f"bitsandbytes {version('bitsandbytes')}: no library for CUDA {torch.version.cuda}"
    return ""


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
        return f"{module} cannot be imported: {first_line(error)}"
    return ""


def numbers(version: str) -> tuple[int, ...]:
    """ "2.11.0+cu130" -> (2, 11, 0)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))
