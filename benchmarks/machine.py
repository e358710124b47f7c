"""What a benchmark ran on, for the heading of its table."""

import datetime
import os
import platform
from pathlib import Path

from llama_lora.model.hardware import compute_dtype, dtype_name

# Of a CPU: which of them it has decides on the compute dtype, and on the kernels that run.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def machine() -> str:
    """The processor and its cores, graphics card if any, compute dtype, and date, on one line."""
    where = f"{len(os.sched_getaffinity(0))} cores of {processor()}{card()}"
    return f"{where}, computing in {dtype_name(compute_dtype())}, {today()}"


def processor() -> str:
    """Its name and those of `INSTRUCTIONS` that it has."""
    name = of_cpu("model name") or platform.processor() or platform.machine()
    found = of_cpu("flags").split()
    return " ".join([name, *(f"+{one}" for one in INSTRUCTIONS if one in found)])


def of_cpu(key: str) -> str:
    """What Linux says of the first core; nothing where it does not."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def card() -> str:
    import torch

    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def today() -> str:
    return datetime.date.today().isoformat()
