"""What a benchmark ran on, for the heading of its table."""

import datetime
import os

from llama_lora.hardware.device import compute_dtype, dtype_name, processor


def machine() -> str:
    """The processor and its cores, graphics card if any, compute dtype, and date, on one line."""
    where = f"{len(os.sched_getaffinity(0))} cores of {processor()}{card()}"
    return f"{where}, computing in {dtype_name(compute_dtype())}, {today()}"


def card() -> str:
    import torch

    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def today() -> str:
    return datetime.date.today().isoformat()
