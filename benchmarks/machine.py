"""What a benchmark ran on, for the heading of its table."""

import datetime
import os
import platform


def machine() -> str:
    """The processor, cores, graphics card if any, and date, on one line."""
    return f"{len(os.sched_getaffinity(0))} cores of {processor()}{card()}, {today()}"


def processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def card() -> str:
    import torch

    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def today() -> str:
    return datetime.date.today().isoformat()
