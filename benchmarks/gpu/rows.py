"""What `gpu_16gb.py` measures: the bases that it makes, and the rows of its tables."""

from dataclasses import asdict, dataclass, replace
from itertools import groupby

from pages import PRECISIONS

README = "README's command"  # what it adds to the name of its row
CONTEXT_RANK = 32
SEARCHING = "searching"  # the status of a search for the longest context that has not ended
FULL = (512, 14), (1024, 7), (2048, 4)  # lengths, and the rows of a micro-batch of the reference
ENDS = FULL[0], FULL[-1]
OTHERS = {"unsloth": "unsloth", "TRL": "trl"}  # contenders that need a module of their own


@dataclass(frozen=True)
class Kind:
    """A base to make.

    Attributes:
        config: sizes, by transformers' names.
        scale: by which the lengths of real conversations are divided for it.
        most: tokens that are worth trying as a context.
    """

    config: dict[str, int]
    scale: int = 1
    most: int = 1 << 18


KINDS = {
    "7b": Kind(
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
        }
    ),
    "tiny": Kind(
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
        },
        scale=16,
        most=512,
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of a table: who trains, on what, and how.

    Attributes:
        name: by which results are kept.
        contender: "ours", "reference", "TRL" or "unsloth".
        window: tokens that the real conversations were split for.
        length: tokens of a row; the window, or a fraction of it for a tiny base.
        dtype: "fastest" on this device, or "float16".
        kernel: of attention: "any", or "memory-efficient", which every card has.
        recompute: --gradient_checkpointing.
        targets: linear layers with LoRA matrices.
        search: find the longest context that fits, up to `length` tokens.
        profiled: see where the time of a step goes.
    """

    name: str
    contender: str
    quantization: str
    window: int
    length: int
    batch: int
    dtype: str = "fastest"
    kernel: str = "any"
    recompute: str = "auto"
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    optim: str = "adamw_torch"
    search: bool = False
    profiled: bool = False

    @property
    def job(self) -> tuple:
        """What rows have in common that one process measures with one model."""
        return self.contender, self.quantization, self.dtype, self.rank, self.targets

    def halved(self) -> "Row":
        """The same with half as many rows to a micro-batch."""
        batch = self.batch // 2
        name = self.name.replace(f"× {self.batch}", f"× {batch}")
        return replace(self, name=name, batch=batch)

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def of(cls, values: dict) -> "Row":
        return cls(**{**values, "targets": tuple(values["targets"])})


def all_rows(kind: Kind) -> list[Row]:
    """Every row for a base of that kind, of all contenders."""

    def row(contender: str, quantization: str, window: int, batch: int, more: str = "", **values):
        name = f"{contender} {PRECISIONS[quantization]} {window:,} × {batch}"
        name += f", {more}" if more else ""
        return Row(name, contender, quantization, window, window // kind.scale, batch, **values)

    def of_lengths(contender: str, quantization: str, lengths=FULL, more: str = "", **values):
        return [row(contender, quantization, *size, more, **values) for size in lengths]

    def ours(quantization: str) -> list[Row]:
        *shorter, longest = FULL
        return [
            *of_lengths("ours", quantization, shorter),
            *of_lengths("ours", quantization, [longest], profiled=True),
        ]

    def reference(quantization: str) -> list[Row]:
        return of_lengths("reference", quantization, dtype="float16", recompute="True")

    def conservative(quantization: str) -> list[Row]:
        old = {"dtype": "float16", "kernel": "memory-efficient"}
        return of_lengths("ours", quantization, ENDS, "as on a T4 or P100", **old)

    def context(quantization: str) -> Row:
        return Row(
            name=f"longest context, {PRECISIONS[quantization]}",
            contender="ours",
            quantization=quantization,
            window=0,
            length=kind.most,
            batch=1,
            recompute="True",
            rank=CONTEXT_RANK,
            targets=("all-linear",),
            optim="adamw_8bit",
            search=True,
        )

    command = row("ours", "8bit", *FULL[0], README, dtype="float16", recompute="True")
    found = [command, *conservative("8bit")]
    for quantization in PRECISIONS:
        found += [*ours(quantization), *reference(quantization)]
    found += [context("4bit"), context("8bit"), *conservative("4bit"), context("none")]
    for other in OTHERS:
        found += of_lengths(other, "4bit", ENDS)
        found += [row(other, quantization, *FULL[-1]) for quantization in ("8bit", "none")]
    return found


def jobs(rows: list[Row]) -> list[list[Row]]:
    """The rows of each process, in their order."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row.job)]
