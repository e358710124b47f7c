"""What `gpu_16gb.py` measures: the bases that it makes, and the rows of its tables, in their order.

What answers the most stands first, since a card may be rented by the minute.
"""

from dataclasses import asdict, dataclass, replace
from itertools import groupby

from benchmarks.pages import PRECISIONS

README = "README's command"  # what it adds to the name of its row
CONTEXT_RANK, ALL_LINEAR = 32, ("all-linear",)
SEARCHING = "searching"  # the status of a search for the longest context that has not ended
SIZES = (512, 14), (1024, 7), (2048, 4)  # lengths, and the rows of a micro-batch of the reference
LONGEST = SIZES[-1]
LLM_INT8 = 7, 5  # the capability that bitsandbytes' own 8-bit product needs
AMPERE = 8, 0  # the capability from which bf16, and more kernels of attention, are there
CHECKS = "checks"  # what stands among the rows where the checks of the card have their turn
OTHERS = {"unsloth": "unsloth", "TRL": "trl"}  # contenders that need a module of their own


@dataclass(frozen=True)
class Kind:
    """A base to make.

    Attributes:
        config: sizes, by transformers' names.
        scale: by which the lengths of real conversations are divided for it.
        most: tokens that are worth trying as a context.
    """

    config: dict[str, int | float]
    scale: int = 1
    most: int = 1 << 18


def _kind(words, hidden, wide, layers, heads, kv_heads, positions, theta=10_000.0, **more) -> Kind:
    config = {
        "vocab_size": words,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "rope_theta": theta,
    }
    return Kind(config, **more)


CHECKED = _kind(512, 256, 512, 4, 4, 2, 512)  # what is checked to compute right

# Of Llama 2 7B, of Llama 3 8B, and of TinyLlama 1.1B; and tiny ones that try the code out.
KINDS = {
    "full": {
        "7B": _kind(32_000, 4096, 11_008, 32, 32, 32, 4096),
        "8B": _kind(128_256, 4096, 14_336, 32, 32, 8, 8192, 500_000.0),
        "1.1B": _kind(32_000, 2048, 5632, 22, 32, 4, 2048),
        "check": CHECKED,
    },
    "tiny": {
        "7B": _kind(512, 64, 128, 2, 4, 4, 512, scale=16, most=512),
        "8B": _kind(1024, 64, 160, 2, 4, 1, 512, 500_000.0, scale=16, most=512),
        "1.1B": _kind(512, 32, 96, 2, 4, 1, 512, scale=16, most=512),
        "check": CHECKED,
    },
}


@dataclass(frozen=True)
class Row:
    """One line of a table: who, on what, and how.

    Attributes:
        name: by which results are kept.
        contender: "ours", "reference", "TRL" or "unsloth".
        base: one of a shape's `KINDS`.
        window: tokens that the real conversations were split for.
        length: tokens of a row; the window, or a fraction of it for a tiny base.
        measures: "speed" of training, with its memory; "context", the longest that fits, up to
            `length` tokens; or "answers".
        dtype: "fastest" on this device, or "float16".
        kernel: of attention: "any"; "memory-efficient", which every card has; "cuDNN" or "no
            cuDNN", example by example.
        recompute: --gradient_checkpointing.
        targets: linear layers with LoRA matrices.
        profiled: see where the time of a step goes.
    """

    name: str
    contender: str
    quantization: str
    window: int
    length: int
    batch: int
    base: str = "7B"
    measures: str = "speed"
    dtype: str = "fastest"
    kernel: str = "any"
    recompute: str = "auto"
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    optim: str = "adamw_torch"
    profiled: bool = False

    def job(self, fastest: str) -> tuple:
        """What rows have in common that are measured with one model; `fastest` is a dtype."""
        dtype = fastest if self.dtype == "fastest" else self.dtype
        trains, fresh = self.measures != "answers", self.fresh
        model = self.contender, self.base, self.quantization, dtype, self.rank, self.targets
        return *model, trains, fresh

    @property
    def fresh(self) -> bool:
        """Whether it wants a process in which nothing was computed before.

        A context shares the card with all that libraries have loaded, and cuDNN plans anew for
        each length that it has not met.
        """
        return self.measures == "context" or "cuDNN" in self.kernel

    def is_for(self, capability: list[int] | None) -> bool:
        """Whether a card of that capability can do this, and does not do it in another row."""
        if capability is None:
            return True
        others = self.quantization == "8bit" and self.contender != "ours"
        if others and tuple(capability) < LLM_INT8:
            return False
        return self.kernel == "any" or tuple(capability) >= AMPERE

    @property
    def can_be_halved(self) -> bool:
        """Whether it is tried with fewer rows where it does not fit; ours computes in parts."""
        return self.contender != "ours" and self.measures == "speed" and self.batch > 1

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


def all_rows(kinds: dict[str, Kind]) -> list[Row | str]:
    """Every row for the bases of a shape, in the order of their turns; `CHECKS` among them."""
    make = Rows(kinds)
    return [
        *make.pair("4bit", LONGEST, profiled=True),
        *make.pair("8bit", LONGEST, profiled=True),
        CHECKS,
        make.command(),
        *make.against_the_plan(),
        *make.answers(),
        *make.pairs("4bit"),
        *make.pairs("8bit"),
        *make.old_cards("4bit"),
        *make.old_cards("8bit"),
        *make.cudnn(),
        *make.tiny_llama(),
        *make.others(),
        *make.contexts(),
    ]


class Rows:
    """Makes the rows of each part for a shape's bases."""

    def __init__(self, kinds: dict[str, Kind]):
        self.kinds = kinds

    def row(self, contender, quantization, size, more="", base="7B", **values) -> Row:
        window, batch = size
        on = f" {base}" if base != "7B" else ""
        name = f"{contender}{on} {PRECISIONS[quantization]} {window:,} × {batch}"
        name += f", {more}" if more else ""
        length = window // self.kinds[base].scale
        return Row(name, contender, quantization, window, length, batch, base, **values)

    def pair(self, quantization: str, size: tuple[int, int], *more, **values) -> list[Row]:
        """Ours beside FastChat's recipe."""
        recipe = {"dtype": "float16", "recompute": "True"} | values
        return [
            self.row("ours", quantization, size, *more, **values),
            self.row("reference", quantization, size, *more, **recipe),
        ]

    def pairs(self, quantization: str) -> list[Row]:
        """Of the shorter lengths: all of ours, then all of the reference's."""
        both = [self.pair(quantization, size) for size in SIZES if size != LONGEST]
        return [pair[which] for which in (0, 1) for pair in both]

    def command(self) -> Row:
        return self.row("ours", "8bit", SIZES[0], README, dtype="float16", recompute="True")

    def against_the_plan(self) -> list[Row]:
        """Settings far apart, whose memory the plan foretells; the command is the fifth."""
        kept, again = {"recompute": "False"}, {"recompute": "True"}
        return [
            self.row("ours", "8bit", (512, 2), "nothing recomputed", **kept),
            self.row("ours", "8bit", (2048, 8), "all recomputed", **again),
            self.row("ours", "4bit", (1024, 2), "nothing recomputed", **kept),
            self.row("ours", "4bit", (2048, 4), "all recomputed", **again),
        ]

    def old_cards(self, quantization: str) -> list[Row]:
        """What a T4 or P100 has: fp16, and attention without FlashAttention."""
        old = {"dtype": "float16", "kernel": "memory-efficient"}
        sizes = SIZES[0], LONGEST
        return [self.row("ours", quantization, s, "as on a T4 or P100", **old) for s in sizes]

    def cudnn(self) -> list[Row]:
        """Against one call for all examples, and to see what cuDNN's plans take."""
        loop = "example by example"
        kernels = (f"{loop}, with cuDNN", "cuDNN"), (f"{loop}, without cuDNN", "no cuDNN")
        return [self.row("ours", "4bit", LONGEST, told, kernel=kernel) for told, kernel in kernels]

    def tiny_llama(self) -> list[Row]:
        """What a public notebook trains on a T4: 2,441 tokens/s in 13.5 GB."""
        values = {"recompute": "False", "rank": CONTEXT_RANK, "targets": ALL_LINEAR}
        return self.pair("4bit", (4096, 2), "nothing recomputed", "1.1B", **values)

    def answers(self) -> list[Row]:
        return [
            Row(
                name=f"{contender} {PRECISIONS[quantization]}, answers",
                contender=contender,
                quantization=quantization,
                window=0,
                length=0,
                batch=1,
                measures="answers",
                dtype="fastest" if contender == "ours" else "float16",
            )
            for quantization in ("4bit", "8bit", "none")
            for contender in ("ours", "reference")
        ]

    def others(self) -> list[Row]:
        """Trainers that may be installed beside."""
        return [
            self.row(other, quantization, size)
            for other in OTHERS
            for quantization, size in (("4bit", SIZES[0]), ("4bit", LONGEST), ("8bit", LONGEST))
        ]

    def contexts(self) -> list[Row]:
        return [
            Row(
                name=f"longest context, {base} {PRECISIONS[quantization]}",
                contender="ours",
                quantization=quantization,
                window=0,
                length=self.kinds[base].most,
                batch=1,
                base=base,
                measures="context",
                recompute="True",
                rank=CONTEXT_RANK,
                targets=ALL_LINEAR,
                optim="adamw_8bit",
            )
            for base, quantization in (("8B", "4bit"), ("7B", "4bit"), ("7B", "8bit"))
        ]


def jobs(rows: list[Row | str], fastest: str) -> list[list[Row] | str]:
    """What one model is loaded for after the other: rows in their order, and the checks.

    `fastest` is the dtype that the device computes in by itself.
    """

    def key(row: Row | str):
        return row if row == CHECKS else row.job(fastest)

    return [CHECKS if key_of == CHECKS else list(group) for key_of, group in groupby(rows, key=key)]
