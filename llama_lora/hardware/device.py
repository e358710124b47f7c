"""What this machine's device, or a card of the table, can do: base precision, compute dtype."""

import contextlib
import os
import platform
from pathlib import Path

from llama_lora.cli import InputError
from llama_lora.hardware.cards import CARDS, CPU, Card, like

QUANTIZATIONS = ("auto", "8bit", "4bit", "none")
# Which of these a CPU has decides the compute dtype and the kernels that run.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
DTYPE_SWITCH = "LLAMA_LORA_DTYPE"  # an environment variable: float32, bfloat16 or float16


def present() -> Card:
    """The current device: the CUDA card, with the memory that CUDA reports, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return CARDS[CPU]
    found = torch.cuda.get_device_properties()
    return like(found.name, (found.major, found.minor), found.total_memory)


def device_name() -> str:
    """The device's name as people know it, with its capability."""
    return present().shown


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processes_here() -> int:
    """How many processes of this run share this machine, as deepspeed or torchrun tells them."""
    told = (os.environ.get(name) for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"))
    return max(int(number or 1) for number in told)


def processor() -> str:
    """The CPU's name, and which of `INSTRUCTIONS` it has."""
    name = _of_cpu("model name") or platform.processor() or platform.machine()
    found = _of_cpu("flags").split()
    return " ".join([name, *(f"+{one}" for one in INSTRUCTIONS if one in found)])


def _of_cpu(key: str) -> str:
    """What Linux says of the first core; "" elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def compute_dtype(card: Card | None = None):
    """The fastest dtype for training and answers on `card` (default: this machine's device).

    bf16, fp16, or fp32 on plain CPUs: without AVX512-BF16 or AMX, a CPU computes bf16 products in
    one scalar loop, hundreds of times slower than fp32. On this machine `DTYPE_SWITCH` overrides
    that, however slow its choice.

    Raises:
        InputError: the switch does not name a dtype.
    """
    import torch

    if card is None and (switched := switched_dtype()):
        return switched
    card = card or present()
    if card.capability is not None:
        return getattr(torch, card.dtype)
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast_bf16 else torch.float32


def autocast(*tensors) -> tuple:
    """Cast as autocast would for an operator that it knows; it does not know our own."""
    import torch

    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def without_autocast(device: str):
    """A context in which autocast is off, where a device has it."""
    import torch

    has_it = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if has_it else contextlib.nullcontext()


def switched_dtype():
    """The compute dtype that `DTYPE_SWITCH` asks for; None if it is not set."""
    import torch

    name = os.environ.get(DTYPE_SWITCH)
    if not name:
        return None
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"{DTYPE_SWITCH}={name}: expected float32, bfloat16 or float16")
    return getattr(torch, name)


def dtype_name(dtype) -> str:
    """`torch.float16` -> "float16"."""
    return str(dtype).removeprefix("torch.")


def resolve_quantization(wanted: str, card: Card | None = None) -> tuple[str, str]:
    """The precision to load a base in on `card` (default: this machine's device), and the reason.

    Raises:
        InputError: 4 bits are asked for on a card without NF4 kernels.
    """
    card = card or present()
    if wanted == "auto":
        return "8bit", f"8-bit base on {card.shown}"
    if wanted == "4bit" and not card.runs_nf4:
        raise InputError(
            f"--quantization 4bit: bitsandbytes' NF4 kernels need compute capability 6.0 or "
            f"higher, found {card.shown}; use --quantization 8bit"
        )
    return wanted, f"{wanted} base, as asked for" if wanted != "none" else "unquantized base"
