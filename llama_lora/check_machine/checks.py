"""What training needs on a machine: each thing is tried, and what is missing gets a remedy."""

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llama_lora.cli import InputError
from llama_lora.hardware import nvidia_driver
from llama_lora.hardware.cards import (
    BLACKWELL,
    GIB,
    OLDEST_CAPABILITY,
    TORCH_INDEX,
    Card,
    has_kernels,
    like,
)
from llama_lora.hardware.device import (
    compute_dtype,
    cores,
    dtype_name,
    present,
    resolve_quantization,
)
from llama_lora.text import brief

OLDEST_PYTHON = 3, 11
BUILT_ON_THE_SPOT = {"pyicu", "pycld2"}
INSTALL_ALL = "pip install -r requirements.txt"
TO_BUILD = "apt-get install -y libicu-dev pkg-config g++ python3-dev"

# Where bitsandbytes lacks code for a card, to try it ends the process.
NO_KERNELS = "not tried: bitsandbytes' kernels need compute capability {}.{}".format(
    *OLDEST_CAPABILITY
)
BASES = {"8bit": "8-bit base", "4bit": "4-bit base", "none": "unquantized"}
TRAINING = "llama_lora.model.base", "llama_lora.model.adapter", "llama_lora.train.trainer"
CORPUS = (
    "icu",
    "pycld2",
    "polyglot.detect",
    "llama_lora.corpus.language.detector",
    "llama_lora.corpus.clean.cleaner",
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at or tried.

    Attributes:
        remedy: the command or flag that fixes it; "" if nothing can or need be fixed.
        stops: whether training cannot run like this.
        kernels: the kernels that ran, to help find a fault.
    """

    what: str
    found: str
    ok: bool = True
    remedy: str = ""
    stops: bool = False
    kernels: str = ""

    @property
    def mark(self) -> str:
        """The mark at the beginning of its line."""
        return "ok" if self.ok else "FAIL" if self.stops else "--"


def examine(requirements: Path, folder: Path) -> Iterator[Finding]:
    """Look at everything, as long as it makes sense to continue; this takes a few seconds.

    Args:
        requirements: the project's requirements.txt, each line of it `name==version` or a comment.
        folder: where runs will be kept.
    """
    pins = _pins(requirements)
    yield python()
    yield packages(pins)
    if find_spec("torch") is None:
        yield Finding("torch", "not installed", False, setup_command(), stops=True)
        return
    found = [*devices(pins["torch"]), imports("training", TRAINING, INSTALL_ALL, stops=True)]
    yield from found
    if any(finding.stops for finding in found):
        return  # the rest would end in the libraries' own errors
    yield room(folder)
    yield from bases(pins["bitsandbytes"])
    yield optimizer(pins["bitsandbytes"])
    yield attention()
    rebuild = " ".join(f"{name}=={pins[name]}" for name in sorted(BUILT_ON_THE_SPOT))
    rebuild = f"{_as_root(TO_BUILD)} && pip install --force-reinstall --no-cache-dir {rebuild}"
    yield imports("corpus", CORPUS, rebuild)
    yield deepspeed(pins["deepspeed"])
    yield compiler()


def python() -> Finding:
    here = sys.version.split()[0]
    ok = sys.version_info >= OLDEST_PYTHON
    wanted = ".".join(map(str, OLDEST_PYTHON))
    remedy = "" if ok else f"{_as_root(f'apt-get install -y python{wanted} python{wanted}-venv')}"
    return Finding("Python", f"{here}, {sys.executable}", ok, remedy, stops=not ok)


def packages(pins: dict[str, str]) -> Finding:
    """The installed versions against the pinned ones; torch's is reported with the device."""
    named = [name for name in pins if name != "torch"]
    wrong = [name for name in named if installed(name).partition("+")[0] != pins[name]]
    told = [f"{len(named) - len(wrong)} of {len(named)} as pinned"]
    if len(wrong) > len(named) / 2:
        return Finding("packages", told[0], False, setup_command())
    told += [f"{name} {installed(name) or 'missing'}, pinned {pins[name]}" for name in wrong]
    wanted = [f"{name}=={pins[name]}" for name in wrong]
    if not installed("llama-lora"):
        told.append("this project is not installed")
        wanted.append("-e .")
    remedy = f"pip install {' '.join(wanted)}" if wanted else ""
    if BUILT_ON_THE_SPOT.intersection(wrong):
        remedy = f"{_as_root(TO_BUILD)} && {remedy}"
    return Finding("packages", "; ".join(told), not wanted, remedy)


def room(folder: Path) -> Finding:
    import psutil

    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(folder).free
    return Finding(
        "room",
        f"{memory / GIB:.1f} GiB of memory free, {disk / GIB:.1f} GiB of disk in "
        f"{folder.absolute()}, {cores()} cores",
    )


def devices(pin: str) -> list[Finding]:
    """Every card, or the CPU, and whether the installed torch computes on it."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about what the findings say
        if torch.cuda.is_available():
            count, built_for = torch.cuda.device_count(), torch.cuda.get_arch_list()
            cards = [_card(index, torch.__version__, built_for, pin) for index in range(count)]
            return [_driver(torch.version.cuda), *cards]
        if known := nvidia_driver.first_card():
            return [card_out_of_reach(known, torch.__version__, torch.version.cuda, pin)]
        kind = torch.backends.cpu.get_cpu_capability()
    return [_computes(f"CPU with {kind}, no card", None, torch.__version__, pin)]


def _driver(cuda: str) -> Finding:
    versions = nvidia_driver.ask("driver_version") or ["version unknown, no nvidia-smi"]
    return Finding("driver", f"NVIDIA {versions[0]}; torch is built for CUDA {cuda}")


def _card(index: int, torch_version: str, built_for: list[str], pin: str) -> Finding:
    import torch

    found = torch.cuda.get_device_properties(index)
    card = like(found.name, (found.major, found.minor), found.total_memory)
    free = torch.cuda.mem_get_info(index)[0]
    return card_with_torch(card, free, torch_version, built_for, pin)


def card_with_torch(
    card: Card, free: int, torch_version: str, built_for: list[str], pin: str
) -> Finding:
    """Whether a build of torch has kernels for a card.

    Args:
        free: bytes of the card's memory.
        built_for: see `has_kernels`.
        pin: torch's version in requirements.txt.
    """
    shown = f"{card.shown}, {free / GIB:.1f} of {card.memory / GIB:.1f} GiB free"
    if has_kernels(built_for, card.capability):
        return _computes(shown, card.capability, torch_version, pin)
    found = f"{shown}; torch {torch_version} has no kernels for it, only {' '.join(built_for)}"
    return Finding("device", found, False, torch_command(pin, card.capability), stops=True)


def _computes(
    shown: str, capability: tuple[int, int] | None, torch_version: str, pin: str
) -> Finding:
    found = f"{shown}; torch {torch_version}"
    if torch_version.partition("+")[0] == pin:
        return Finding("device", found)
    return Finding("device", f"{found}, pinned {pin}", False, torch_command(pin, capability))


def card_out_of_reach(
    known: tuple[str, tuple[int, int]], torch_version: str, cuda: str | None, pin: str
) -> Finding:
    """A card that the driver knows by name and capability, but torch cannot use."""
    name, capability = known
    if cuda is None:
        why, remedy = "is a build without CUDA", torch_command(pin, capability)
    else:
        why = f"is built for CUDA {cuda}, and the driver is too old for that or blocks it"
        remedy = torch_command(pin, capability, oldest_cuda=True)
        if capability >= BLACKWELL:  # no older build supports it
            remedy = "update the NVIDIA driver, to 580 or newer"
    found = f"{name}, but torch {torch_version} {why}"
    return Finding("device", found, False, remedy, stops=True)


def torch_command(pin: str, capability: tuple[int, int] | None, oldest_cuda: bool = False) -> str:
    """The command that installs the build of torch that a card needs."""
    build = Card("", capability, None, None).torch_build
    if build or oldest_cuda:
        build = build or "cu126"
        return f"pip install torch=={pin}+{build} --index-url {TORCH_INDEX}{build}"
    return f"pip install --force-reinstall torch=={pin}"


def setup_command() -> str:
    """The command that installs everything, with the build of torch for this machine's card."""
    known = nvidia_driver.first_card()
    build = known and Card(*known, None, None).torch_build
    index = f"PIP_EXTRA_INDEX_URL={TORCH_INDEX}{build} " if build else ""
    return f"{index}make setup && source .venv/bin/activate"


def bases(pin: str) -> Iterator[Finding]:
    """A training step of a layer in each precision that `--quantization` offers."""
    from llama_lora.check_machine import kernels_used, probe

    card, dtype = present(), compute_dtype()
    device = "cpu" if card.capability is None else "cuda"
    default, _ = resolve_quantization("auto")
    for quantization, what in BASES.items():
        if quantization == "4bit" and not card.runs_nf4:
            yield Finding(what, NO_KERNELS, False)
            continue
        operators = kernels_used.Operators()
        try:
            error = probe.base_error(quantization, dtype, device, operators)
        except (RuntimeError, ImportError, probe.WrongResult) as fault:
            remedy = f"pip install --force-reinstall --no-deps bitsandbytes=={pin}"
            stops = quantization in (default, "none")
            yield Finding(what, f"does not train: {brief(fault)}", False, remedy, stops)
            continue
        allowed = probe.TOLERANCES[quantization]
        found = f"trains in {dtype_name(dtype)}, {error:.2%} from fp32 (at most {allowed:.0%})"
        ran = {
            "8bit": probe.codes_compared(device) if card.runs_nf4 else "",
            "4bit": kernels_used.bitsandbytes(operators.names),
        }
        yield Finding(what, found, kernels=ran.get(quantization, ""))


def optimizer(pin: str) -> Finding:
    """A few steps of bitsandbytes' AdamW with 8-bit states."""
    from llama_lora.check_machine import probe

    if not present().runs_nf4:
        return Finding("8-bit AdamW", NO_KERNELS, False)
    device = "cpu" if present().capability is None else "cuda"
    try:
        error = probe.optimizer_error(device)
    except (RuntimeError, ImportError, probe.WrongResult) as fault:
        remedy = f"pip install --force-reinstall --no-deps bitsandbytes=={pin}"
        return Finding("8-bit AdamW", f"does not work: {brief(fault)}", False, remedy)
    return Finding("8-bit AdamW", f"works, {error:.2%} from fp32 (at most {probe.STEP_ERROR:.0%})")


def attention() -> Finding:
    """Try each kernel of attention; all but the plain one save memory.

    Those of `scaled_dot_product_attention` and, on a card, those that take all examples at once.
    """
    from llama_lora.check_machine import probe

    card, dtype = present(), compute_dtype()
    device = "cpu" if card.capability is None else "cuda"

    def alone(kernel: str) -> float:
        return probe.attention_error(kernel, dtype, device)

    found, right, wrong = _tried(probe.ATTENTION_KERNELS, alone)
    ok, stops = not wrong and len(right) > 1, not right
    if card.capability is not None:
        more, right, wrong = at_once(dtype, device)
        found = f"{found}; {more}"
        ok, stops = ok and not wrong, stops or card.attention not in right
    return Finding("attention", found, ok, stops=stops)


def at_once(dtype, device: str) -> tuple[str, list[str], list[str]]:
    """As `_tried`, of the kernels that take all examples of a row in one call."""
    from llama_lora.check_machine import probe

    def error(kernel: str) -> float:
        return probe.at_once_error(kernel, dtype, device)

    found, right, wrong = _tried(probe.AT_ONCE, error)
    return f"all examples in one call: {found}", right, wrong


def _tried(kernels, error_of) -> tuple[str, list[str], list[str]]:
    """How each kernel fares, and the names of those that are right and of those that are wrong."""
    from llama_lora.check_machine import probe

    right, absent, wrong = {}, [], {}
    for kernel in kernels:
        try:
            right[kernel] = f"{kernel} {error_of(kernel):.2%} from fp32"
        except probe.WrongResult as fault:
            wrong[kernel] = f"{kernel} {fault}"
        except (RuntimeError, ImportError, AttributeError, TypeError):
            absent.append(kernel)
    parts = [", ".join(right.values()) or "none runs"]
    parts += [f"wrong: {', '.join(wrong.values())}"] * bool(wrong)
    parts += [f"unavailable: {', '.join(absent)}"] * bool(absent)
    return "; ".join(parts), list(right), list(wrong)


def learning(seconds: float | None, learning_rate: float | None = None) -> Finding:
    """Train for some seconds, and see whether the loss falls.

    Args:
        seconds, learning_rate: see `short_training.train`.
    """
    from llama_lora.check_machine import short_training

    try:
        run = short_training.train(seconds, learning_rate)
    except (RuntimeError, ImportError, InputError) as fault:
        why = brief(fault).partition("; ")[0]  # what follows is advice for a longer training
        return Finding("learning", f"WRONG: {why}", False, stops=True)
    if run.learned:
        return Finding("learning", str(run))
    fall = f"expected the loss to fall by {short_training.LEAST_FALL:.0%}"
    return Finding("learning", f"WRONG: {fall}; {run}", False, stops=True)


def imports(what: str, modules: tuple[str, ...], remedy: str, stops: bool = False) -> Finding:
    """Whether the modules can be imported, with the libraries that they need."""
    for module in modules:
        try:
            importlib.import_module(module)
        except (ImportError, RuntimeError, AttributeError) as fault:  # of versions that do not fit
            found = f"{module} cannot be imported: {brief(fault)}"
            return Finding(what, found, False, remedy, stops)
    return Finding(what, f"imports {', '.join(modules)}")


def deepspeed(pin: str) -> Finding:
    """DeepSpeed and its launcher; without them only one card trains."""
    found = imports("deepspeed", ("deepspeed",), f"pip install deepspeed=={pin}")
    if not found.ok:
        return found
    if launcher := shutil.which("deepspeed"):
        return Finding("deepspeed", f"{installed('deepspeed')}, launcher {launcher}")
    beside = Path(sys.executable).parent
    if (beside / "deepspeed").exists():
        remedy = f"source {beside / 'activate'}"
    else:
        remedy = f"pip install --force-reinstall --no-deps deepspeed=={pin}"
    return Finding("deepspeed", "its launcher is not on the PATH", False, remedy)


def compiler() -> Finding:
    """What DeepSpeed needs to compile its CPU operator, and pip to build PyICU."""
    command = ["g++", "-x", "c++", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-"]
    missing = []
    if shutil.which("g++") is None:
        missing.append("g++")
    elif subprocess.run(command, input=b"#include <Python.h>", capture_output=True).returncode:
        missing.append("python3-dev")
    if shutil.which("ninja") is None:
        missing.append("ninja-build")
    if not missing:
        return Finding("compiler", "g++ with Python.h, ninja")
    remedy = _as_root(f"apt-get install -y {' '.join(missing)}")
    found = f"missing {', '.join(missing)}; deepspeed on a CPU needs it"
    return Finding("compiler", found, False, remedy)


def _pins(requirements: Path) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in requirements.read_text().splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def installed(name: str) -> str:
    """The version of a package; "" if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _as_root(install: str) -> str:
    command = f"apt-get update && {install}"
    return command if os.geteuid() == 0 else f"sudo sh -c '{command}'"
