"""The findings about a machine, on one screen that can be pasted into a report."""

import os
import platform
import re
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path, PurePath

from llama_lora.check_machine.checks import Finding, installed
from llama_lora.hardware import nvidia_driver
from llama_lora.hardware.cards import GIB, Card
from llama_lora.hardware.device import cores, present, processor

HEADING = "--- to paste into a report ---"
COLUMNS, LINES = 100, 24
INDENT = 13  # columns of the names on the left
TOLD = "8-bit base", "4-bit base", "unquantized", "8-bit AdamW", "attention", "learning"
PACKAGES = "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed"


def lines(findings: list[Finding], verdict: str, root: Path) -> list[str]:
    """The screen: at most `LINES` of `COLUMNS`, without folders and names of people.

    Args:
        root: the folder of this project.
    """
    facts = {
        "card": card(),
        "driver": told_by_driver(),
        "host": host(),
        "versions": versions(),
        "llama-lora": project(root),
    }
    told = [found for found in findings if found.what in TOLD or not found.ok]
    rows = [*facts.items(), *((found.what, _of(found)) for found in told)]
    body = [line for name, text in rows for line in _wrapped(name, text)]
    room = LINES - 2  # besides the heading and the verdict
    if len(body) > room:
        body = [*body[: room - 1], f"{'':{INDENT}}… and more above"]
    return [HEADING, *body, *_wrapped("verdict", verdict)[:1]]


def card() -> str:
    """The card with its capability and memory, from torch or else from the driver."""
    if find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            here, count = present(), torch.cuda.device_count()
            others = f"; {count} cards" if count > 1 else ""
            return f"{here.shown}, {here.memory / GIB:.1f} GiB{others}"
    if known := nvidia_driver.first_card():
        memory = "".join(f", {size}" for size in nvidia_driver.ask("memory.total")[:1])
        return f"{Card(*known, None, None).shown}{memory}; torch cannot use it"
    return "none"


def told_by_driver() -> str:
    """The driver's version."""
    found = nvidia_driver.ask("driver_version")
    return f"NVIDIA {found[0]}" if found else "none found by nvidia-smi"


def host() -> str:
    """The system and its processor, cores and memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (
        f"{platform.system()} {platform.release()}, {cores()} cores of {processor()}, "
        f"{memory / GIB:.1f} GiB"
    )


def versions() -> str:
    """The versions of Python, torch and the libraries that training uses."""
    told = [f"Python {platform.python_version()}", f"torch {_torch_version()}"]
    told += [f"{name} {installed(name) or 'missing'}" for name in PACKAGES]
    if library := _library_of_bitsandbytes():
        told.append(library)
    return ", ".join(told)


def _torch_version() -> str:
    if not find_spec("torch"):
        return "missing"
    import torch

    cuda = f" (CUDA {torch.version.cuda})" if torch.version.cuda else ""
    return f"{torch.__version__}{cuda}"


def _library_of_bitsandbytes() -> str:
    """The file that it has loaded its kernels from; "" if it was not imported."""
    module = sys.modules.get("bitsandbytes.cextension")
    if module is None:
        return ""
    loaded = getattr(getattr(module.lib, "_lib", None), "_name", None)
    return PurePath(loaded).name if loaded else "bitsandbytes without its library"


def project(root: Path) -> str:
    """The version of this project, and the commit if it is a checkout."""
    told = installed("llama-lora") or "not installed"
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:  # no git
            return told
        if done.returncode == 0:
            return f"{told}, commit {done.stdout.strip()}"
    return told


def _of(found: Finding) -> str:
    mark = "" if found.ok else f"{found.mark} "
    return f"{mark}{found.found}" + (f"; {found.kernels}" if found.kernels else "")


def _wrapped(name: str, text: str) -> list[str]:
    """The text on two lines at most."""
    return textwrap.wrap(
        without_folders(text),
        COLUMNS,
        initial_indent=f"{name:{INDENT}}",
        subsequent_indent=" " * INDENT,
        max_lines=2,
        placeholder=" …",
        break_on_hyphens=False,
    )


def without_folders(text: str) -> str:
    """`text` without paths, except the names of libraries and code files: folders name people."""

    def last(path: re.Match) -> str:
        name = PurePath(path[0]).name
        return f"…/{name}" if re.search(r"\.(py|so)\b", name) else "…"

    if home := os.path.expanduser("~").rstrip("/"):  # which may contain spaces
        text = text.replace(home, "/home")
    return re.sub(r"(?<![\w.…])/[^\s'\":,;()]+", last, text)
