"""Whether a device computes what tests hold a CPU to: a line each, "right" or by how much not.

All of it on a small base of random weights, by the parts and the scripts that training is made of.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.contenders import base, lengths
from benchmarks.gpu.contenders.contender import autocast
from benchmarks.gpu.contenders.ours import adapted, on_device
from benchmarks.gpu.reasons import first_line
from benchmarks.gpu.rows import ALL_LINEAR
from benchmarks.gpu.workers import scripts
from llama_lora.check_machine import checks
from llama_lora.hardware.device import compute_dtype, dtype_name
from llama_lora.model.adapter import trainable
from llama_lora.model.labels import IGNORE
from llama_lora.train.compute.packed_attention import BY_EXAMPLE
from llama_lora.train.memory.out_of_memory import Gradients

# Of two ways of computing the same in a few layers: what rounding explains, by dtype.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
PACKED = [100, 60, 37, 9]  # tokens of the examples of a micro-batch
MANY = [250] * 16
SCALE = 1024.0  # of the loss, for fp16


def outcomes(cache: Path, shape: str, done: list[str]) -> Iterator[dict]:
    """Each check by its name, with how it ended, as soon as it has; not those that are `done`."""
    folder = base.made(cache, shape, "check")
    with scripts.Scripts(folder, cache / shape / "runs") as trained:
        trained.start()
        for name, check in all_checks(folder, trained):
            if name not in done:
                yield {"check": name, "outcome": outcome_of(check)}


def outcome_of(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:  # the other checks go on
        return f"failed: {first_line(error)}"


def all_checks(folder: Path, trained: scripts.Scripts) -> Iterator[tuple[str, Callable[[], str]]]:
    """Every check by its name.

    The scripts train meanwhile: what is asked of them comes last, since to import takes them long.
    """
    pin = version("bitsandbytes")
    yield "a layer trains in 8, 4 and 16 bits", lambda: told(checks.bases(pin))
    yield "8-bit AdamW", lambda: told([checks.optimizer(pin)])
    yield "the kernels of attention", lambda: told([checks.attention()])
    for precision in "none", "8bit", "4bit":
        name = f"gradients of packed examples are those of each alone, --quantization {precision}"
        yield name, lambda precision=precision: packed_beside_apart(folder, precision)
    yield "attention is the model's own eager one", lambda: attention_beside_eager(folder)
    yield "lack of memory is survived with the same gradients", lambda: lack_of_memory(folder)
    yield "a training that was killed resumes with the same losses", trained.killed_and_resumed
    yield "an adapter is trained, merged and asked", lambda: merged_beside_adapter(trained)


def told(findings: Iterable[checks.Finding]) -> str:
    """What check_machine.py finds; where the card has no kernel for something, no fault is."""
    found = list(findings)
    wrong = any(one.remedy or one.stops or "wrong" in one.found for one in found)
    parts = ["; ".join(filter(None, [one.found, one.kernels])) for one in found]
    return f"{'WRONG' if wrong else 'right'}: {'. '.join(parts)}"


def verdict(error: float, dtype: torch.dtype) -> str:
    """How far two ways of computing the same are apart, and whether rounding explains it."""
    right = "right" if error <= LIMITS[dtype] else "WRONG"  # NaN is, too
    return f"{right}: {error:.2%} apart in {dtype_name(dtype)} (at most {LIMITS[dtype]:.2%})"


def packed_beside_apart(folder: Path, precision: str) -> str:
    step = Step(folder, precision, PACKED)
    together, apart = step.gradients(parts=1), step.gradients(parts=len(PACKED))
    return verdict(distance(apart, together), step.dtype)


def attention_beside_eager(folder: Path) -> str:
    step = Step(folder, "none", [PACKED[0]])
    ids = step.batch["input_ids"]
    found = {}
    for implementation in (BY_EXAMPLE, "eager"):
        step.model.get_base_model().set_attn_implementation(implementation)
        with torch.no_grad():
            found[implementation] = step.model(input_ids=ids, use_cache=False).logits.float()
    return verdict(distance(found[BY_EXAMPLE], found["eager"]), step.dtype)


def lack_of_memory(folder: Path) -> str:
    step = Step(folder, "none", MANY)
    expected = step.gradients(parts=1)
    with little_memory(step):
        found = step.gradients(parts=1)
    if step.parts == 1:
        return "WRONG: nothing was lacking"
    return f"{verdict(distance(found, expected), step.dtype)}, in {step.parts} parts"


def merged_beside_adapter(trained: scripts.Scripts) -> str:
    """The scores of the merged model beside those of base and adapter, along a text."""
    adapter, merged = trained.merged()
    if not trained.answer(merged):
        return "WRONG: the merged model says nothing"
    expected = scores(trained.base, adapter)
    changed = distance(scores(trained.base), expected)
    error = distance(scores(merged), expected)
    if not error < changed / 10:
        return f"WRONG: {error:.2%} apart, and the base alone {changed:.2%}"
    coarser = max(compute_dtype(), torch.float16, key=LIMITS.get)  # merged weights are fp16
    return f"{verdict(error, coarser)}, and the base alone {changed:.2%}"


@torch.inference_mode()
def scores(base: Path, adapter: Path | None = None) -> torch.Tensor:
    """Of every word after each of a text, as generate.py's model gives them."""
    from llama_lora.chat.adapters import load

    model, _, _ = load(base, adapter)
    return model(torch.arange(3, 103, device=model.device)[None]).logits.float()


class Step:
    """A micro-batch of random examples, and a base with LoRA matrices, none of them zero."""

    def __init__(self, folder: Path, precision: str, sizes: list[int]):
        self.dtype = compute_dtype()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        where = self.dtype, self.device
        self.model = adapted(folder, precision, *where, 8, ALL_LINEAR, dropout=0.0).train()
        for name, parameter in trainable(self.model):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        words, draw = self.model.config.vocab_size, np.random.default_rng(0)
        examples = [lengths.piece(size, size // 2, words, draw) for size in sizes]
        self.batch = on_device(examples, self.device)
        self.most, self.parts = None, 1

    def gradients(self, parts: int) -> torch.Tensor:
        """Of all matrices, in one vector; what `parts` came to is kept."""
        count = (self.batch["labels"] != IGNORE).sum()
        parameters = [parameter for _, parameter in trainable(self.model)]
        computed = Gradients(parameters, lambda line: None, parts)

        def loss_of(part: dict) -> torch.Tensor:
            if self.most and part["input_ids"].numel() > self.most:
                raise torch.OutOfMemoryError("as if there were no more")
            with autocast(self.device, self.dtype):
                return self.model(**part, num_items_in_batch=count).loss

        _, found = computed.compute(loss_of, self.batch, SCALE)
        self.parts = computed.parts
        return torch.cat([gradient.flatten() for gradient in found])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, by the Euclidean norm."""
    return ((found - expected).norm() / expected.norm()).item()


@contextmanager
def little_memory(step: Step) -> Iterator[None]:
    """The card has too little for the whole micro-batch; without one, the loss says so."""
    if step.device.type == "cpu":
        step.most = step.batch["input_ids"].numel() // 2
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    least = torch.cuda.memory_reserved()
    step.gradients(parts=1)
    most = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((least + 0.6 * (most - least)) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
