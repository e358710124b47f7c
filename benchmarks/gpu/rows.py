"""What `gpu_16gb.py` measures: the bases that it makes, and the rows of its tables."""

from dataclasses import asdict, dataclass, replace
from itertools import groupby

PRECISIONS = {"int8": "8bit", "NF4": "4bit", "16-bit": "none"}  # and what --quantization calls them
README = "README's command"  # what it adds to the name of its row
CONTEXT_RANK = 32
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
    precision: str
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
        return self.contender, self.precision, self.dtype, self.rank, self.targets

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

    def row(contender: str, precision: str, window: int, batch: int, more: str = "", **values):
        name = f"{contender} {precision} {window:,} × {batch}" + (f", {more}" if more else "")
        return Row(name, contender, precision, window, window // kind.scale, batch, **values)

    def of_lengths(contender: str, precision: str, lengths=FULL, more: str = "", **values):
        return [row(contender, precision, *size, more, **values) for size in lengths]

    def ours(precision: str) -> list[Row]:
        *shorter, longest = FULL
        return [
            *of_lengths("ours", precision, shorter),
            *of_lengths("ours", precision, [longest], profiled=True),
        ]

    def reference(precision: str) -> list[Row]:
        return of_lengths("reference", precision, dtype="float16", recompute="True")

    def conservative(precision: str) -> list[Row]:
        old = {"dtype": "float16", "kernel": "memory-efficient"}
        return of_lengths("ours", precision, ENDS, "as on a T4 or P100", **old)

    def context(precision: str) -> Row:
        return Row(
            name=f"longest context, {precision}",
            contender="ours",
            precision=precision,
            window=0,
            length=kind.most,
            batch=1,
            recompute="True",
            rank=CONTEXT_RANK,
            targets=("all-linear",),
            optim="adamw_8bit",
            search=True,
        )

    command = row("ours", "int8", *FULL[0], README, dtype="float16", recompute="True")
    found = [command, *conservative("int8")]
    for precision in PRECISIONS:
        found += [*ours(precision), *reference(precision)]
    found += [context("NF4"), context("int8"), *conservative("NF4"), context("16-bit")]
    for other in OTHERS:
        found += of_lengths(other, "NF4", ENDS)
        found += [row(other, precision, *FULL[-1]) for precision in ("int8", "16-bit")]
    return found


def jobs(rows: list[Row]) -> list[list[Row]]:
    """The rows of each process, in their order."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row.job)]
