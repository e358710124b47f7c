"""Known cards, and what each compute capability runs; this machine's hardware is in `device`."""

import re
from dataclasses import dataclass, replace

from llama_lora.cli import InputError

GIB = 2**30
CPU = "CPU"

BF16_CAPABILITY = (8, 0)  # torch.cuda.is_bf16_supported() also says True for slow emulation
FLASH_CAPABILITY = (8, 0)
TENSOR_CORES_CAPABILITY = (7, 0)
TRITON_CAPABILITY = (7, 0)  # what torch's Inductor asks for; Triton itself promises 8.0
NEWEST_BUILDS_CAPABILITY = (7, 5)  # the lowest of torch and bitsandbytes for CUDA 12.8 and later
BLACKWELL = (10, 0)  # torch's builds for CUDA 12.6 have kernels only below this
OLDEST_CAPABILITY = (6, 0)  # bitsandbytes has no kernels below this: no NF4, no 8-bit AdamW

TORCH_INDEX = "https://download.pytorch.org/whl/"


@dataclass(frozen=True)
class Card:
    """A card, or the CPU, and what its generation can do.

    If a card comes in several versions, these are the slower one's figures.

    Attributes:
        name: as people call it.
        capability: CUDA compute capability; None for the CPU.
        memory: bytes that CUDA reports in total, less than the box says; None for the CPU.
        bandwidth: of its memory, bytes per second; None for the CPU.
        fp32, fp16, bf16: TFLOPS of dense matrix products with sums in fp32, as its maker publishes
            them; None if it has no units for that dtype.
    """

    name: str
    capability: tuple[int, int] | None
    memory: int | None
    bandwidth: int | None
    fp32: float | None = None
    fp16: float | None = None
    bf16: float | None = None

    @property
    def shown(self) -> str:
        """Its name and capability, for messages."""
        if self.capability is None:
            return self.name
        major, minor = self.capability
        return f"{self.name} (compute capability {major}.{minor})"

    @property
    def runs_nf4(self) -> bool:
        """Whether a 4-bit base and the 8-bit optimizers run."""
        return self.capability is None or self.capability >= OLDEST_CAPABILITY

    @property
    def dtype(self) -> str:
        """The dtype that training computes in; on a CPU with fast bf16, bf16 is used instead."""
        if self.capability is None:
            return "float32"
        return "bfloat16" if self.capability >= BF16_CAPABILITY else "float16"

    @property
    def peak_flops(self) -> float | None:
        """Operations per second in matrix products of `dtype`; None for the CPU."""
        tflops = {"float32": self.fp32, "float16": self.fp16, "bfloat16": self.bf16}[self.dtype]
        return tflops and tflops * 1e12

    @property
    def attention(self) -> str:
        """The kernel that attends in `dtype`, see `train/compute/attention_kernels.py`."""
        if self.capability is None:
            return "sdpa for CPU"
        return "FlashAttention" if self.capability >= FLASH_CAPABILITY else "memory-efficient"

    @property
    def runs_triton(self) -> bool:
        """Whether Triton kernels run, such as torch.compile's and Liger's."""
        return self.capability is not None and self.capability >= TRITON_CAPABILITY

    @property
    def torch_build(self) -> str | None:
        """The only CUDA build of torch with its kernels, such as "cu126"; None if any will do."""
        if self.capability is None:
            return "cpu"
        return "cu126" if self.capability < NEWEST_BUILDS_CAPABILITY else None


def _card(name, capability, gib, gb_per_second, *tflops) -> Card:
    return Card(name, capability, round(gib * GIB), gb_per_second * 10**9, *tflops)


# Peaks and bandwidths: NVIDIA's data sheets and architecture papers, without sparsity. The P100's
# fp16 peak of 18.7 is for sums in fp16; cuBLAS sums in fp32, at fp32's speed. Memory: GiB that
# PyTorch's messages name as the total capacity.
_ALL = (
    _card("P100", (6, 0), 15.89, 732, 9.3, 9.3),
    _card("V100", (7, 0), 15.77, 900, 14, 112),
    _card("T4", (7, 5), 14.56, 320, 8.1, 65),
    _card("RTX 2080 Ti", (7, 5), 10.75, 616, 13.4, 53.8),
    _card("A10", (8, 6), 21.98, 600, 31.2, 125, 125),
    _card("A10G", (8, 6), 21.98, 600, 31.5, 70, 70),
    _card("RTX 3090", (8, 6), 23.68, 936, 35.6, 71, 71),
    _card("RTX A4000", (8, 6), 15.73, 448, 19.2, 76.7, 76.7),
    _card("RTX 4080", (8, 9), 15.7, 717, 48.7, 97.5, 97.5),
    _card("RTX 4090", (8, 9), 23.64, 1008, 82.6, 165.2, 165.2),
    _card("L4", (8, 9), 21.96, 300, 30.3, 121, 121),
    _card("RTX 5060 Ti", (12, 0), 15.45, 448, 23.7, 47.4, 47.4),
    _card("RTX 5080", (12, 0), 15.45, 960, 56.3, 112.6, 112.6),
    _card("A100", (8, 0), 39.39, 1555, 19.5, 312, 312),
    _card("A100 80GB", (8, 0), 79.15, 1935, 19.5, 312, 312),
    _card("H100", (9, 0), 79.1, 2000, 51, 756, 756),
    Card(CPU, None, None, None),
)
CARDS: dict[str, Card] = {card.name: card for card in _ALL}


def card_named(text: str) -> Card:
    """The card that `text` names: "T4", "rtx 3090", "V100 32GB", or just a size, "16GiB".

    A size alone gives an unknown card, assumed to be like a T4 except for its memory.

    Raises:
        InputError: neither a known card nor a size; names the known cards.
    """
    named, size = _named(text), _size(text)
    if named is None and (size is None or not text.strip()[0].isdigit()):
        known = ", ".join(CARDS)
        raise InputError(
            f"{text}: not a known card; expected one of {known}, or a size such as 16GiB"
        )
    if named is None:
        return unknown(f"unknown card of {size / GIB:.1f} GiB, assumed to be like a T4", size)
    if size is None or named.memory is None or abs(size / named.memory - 1) < 0.1:
        return named
    return replace(named, name=f"{named.name} with {size / GIB:.1f} GiB", memory=size)


def unknown(name: str, memory: int, capability: tuple[int, int] = (7, 5)) -> Card:
    """A card that is not in the table, as slow as the slowest similar card in it."""
    slow = CARDS["P100" if capability < TENSOR_CORES_CAPABILITY else "T4"]
    return replace(slow, name=name, memory=memory, capability=capability, bf16=slow.fp16)


def like(name: str, capability: tuple[int, int], memory: int) -> Card:
    """The card that CUDA calls `name`, with the capability and memory that CUDA reports."""
    named = _named(name)
    if named is None or named.capability != capability:
        return unknown(name, memory, capability)
    return replace(named, name=name, memory=memory)


def has_kernels(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Whether a build of torch has code for a card.

    Args:
        built_for: `torch.cuda.get_arch_list()`: "sm_86" is code for 8.6 and later 8.x,
            "compute_120" is compiled on the spot for 12.0 and everything later.
    """

    def runs(architecture: str) -> bool:
        kind, number = re.fullmatch(r"(sm|compute)_(\d+)[af]?", architecture).groups()
        code = divmod(int(number), 10)
        return code <= capability and (kind == "compute" or code[0] == capability[0])

    return any(runs(architecture) for architecture in built_for)


def markdown_table() -> str:
    """All cards and what each one runs, for docs/cards.md."""
    head = (
        "card | capability | memory, GiB | GB/s | TFLOPS | base | computes in | attention | Triton"
        " | torch and bitsandbytes"
    )
    rows = [head, " | ".join("---" for _ in head.split(" | ")), *map(_row, CARDS.values())]
    return "\n".join(f"| {row} |" for row in rows)


def _row(card: Card) -> str:
    figures, dtype, build = ["–"] * 4, "bfloat16 where it is fast, else float32", "any build"
    if card.capability is not None:
        figures = [
            "{}.{}".format(*card.capability),
            f"{card.memory / GIB:.1f}",
            f"{card.bandwidth / 10**9:,.0f}",
            f"{card.peak_flops / 1e12:g}",
        ]
        dtype = card.dtype
        if card.torch_build:
            build = f"only for CUDA 12.6 ({card.torch_build})"
        elif card.capability >= BLACKWELL:
            build = "any but for CUDA 12.6"
    bases = ["8-bit"] + ["4-bit"] * card.runs_nf4 + ["16-bit"]
    triton = "yes" if card.runs_triton else "no"
    return " | ".join([card.name, *figures, ", ".join(bases), dtype, card.attention, triton, build])


def _named(text: str) -> Card | None:
    """The known card whose words are all in `text`; of several, the one with the most words."""
    words = _words(text)
    found = [card for card in _ALL if _words(card.name) - {"rtx"} <= words]
    return max(found, key=lambda card: len(_words(card.name)), default=None)


def _words(text: str) -> set[str]:
    text = re.sub(r"(?<=\d) *(gi?b)\b", r"\1", text.lower())
    text = re.sub(r"\brtx(?=\d)|(?<=\d)(?=(ti|super)\b)", r"\g<0> ", text)
    return set(re.findall(r"[a-z0-9]+", text))


def _size(text: str) -> int | None:
    """The memory size in `text`, in bytes."""
    found = re.search(r"\b(\d+(?:\.\d+)?)\s*(gi?b)\b", text.lower())
    return found and round(float(found[1]) * (GIB if found[2] == "gib" else 10**9))
