"""What a card can do: capability → base precision and compute dtype, with the reason in words."""

import os

from llama_lora.cli import InputError

INT8_CAPABILITY = (7, 5)  # bitsandbytes' int8 kernels since 0.45; NF4 runs from 6.0 on
BF16_CAPABILITY = (8, 0)  # torch.cuda.is_bf16_supported() also says True for slow emulation

QUANTIZATIONS = ("auto", "8bit", "4bit", "none")


def capability() -> tuple[int, int] | None:
    """Compute capability of the current CUDA device, or None on CPU."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def device_name() -> str:
    """The name by which people know the device, with its capability."""
    import torch

    if not torch.cuda.is_available():
        return "CPU"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def compute_dtype():
    """The fastest dtype this device trains and answers in: bf16, fp16, or fp32 on plain CPUs.

    bf16 products on a CPU without AVX512-BF16 or AMX run on one scalar loop, hundreds of times
    slower than fp32.
    """
    import torch

    found = capability()
    if found is not None:
        return torch.bfloat16 if found >= BF16_CAPABILITY else torch.float16
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast_bf16 else torch.float32


def dtype_name(dtype) -> str:
    """`torch.float16` -> "float16"."""
    return str(dtype).removeprefix("torch.")


def resolve_quantization(wanted: str) -> tuple[str, str]:
    """The base precision to load and the reason.

    Raises:
        InputError: 8 bits asked for on a card whose int8 kernels do not exist.
    """
    found = capability()
    int8_runs = found is None or found >= INT8_CAPABILITY
    if wanted == "auto":
        if int8_runs:
            return "8bit", f"8-bit base: int8 runs on {device_name()}"
        return "4bit", f"4-bit base: int8 kernels need compute capability 7.5, {device_name()}"
    if wanted == "8bit" and not int8_runs:
        raise InputError(
            f"--quantization 8bit: bitsandbytes' int8 kernels need compute capability 7.5 or "
            f"higher, found {device_name()}; use --quantization 4bit"
        )
    return wanted, f"{wanted} base, as asked for" if wanted != "none" else "unquantized base"
