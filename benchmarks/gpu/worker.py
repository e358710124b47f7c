"""A process of gpu_16gb.py: measures what its argument says, and prints findings as JSON."""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu.rows import KINDS, Row

PACKAGES = "torch", "transformers", "peft", "bitsandbytes", "trl", "unsloth"
MARK = "gpu_16gb "  # what a line of findings begins with, among whatever libraries print


def main() -> None:
    for findings in work(json.loads(sys.argv[1])):
        print(MARK + json.dumps(findings), flush=True)


def work(request: dict) -> Iterator[dict]:
    """What is asked for: the device, or some rows.

    Args:
        request: `folder` of the base, and its `shape`; for rows also `gib`, `steps` and `rows`.
    """
    if "rows" in request:
        yield from measure_rows(request)
    else:
        yield {"device": device(Path(request["folder"]), request["shape"])}


def versions() -> dict[str, str]:
    """Of the packages that trainings are made of."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# ---- The device ----


def device(folder: Path, shape: str) -> dict:
    """What is here, whether it computes right, and how fast; the base is made, too."""
    import torch
    from train_speed import peak_rate

    from gpu import base
    from llama_lora.model.hardware import compute_dtype, dtype_name, present
    from llama_lora.model.shape import shape_of
    from llama_lora.train import pace

    kind = KINDS[shape]
    base.make(folder, kind)
    card, on = present(), "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "name": card.name,
        "capability": card.capability,
        "memory": card.memory,
        "dtype": dtype_name(compute_dtype()),
        "cuda": torch.version.cuda,
        "peak_flops": peak_rate(folder, 8192 // kind.scale),
        "planner_rate": pace.measured_rate(shape_of(folder), compute_dtype(), on),
        "checks": computations(),
    }


def computations() -> dict[str, str]:
    """What check_machine.py tries: a step in each precision, the optimizer, attention's kernels."""
    from llama_lora.train import machine

    pin = version("bitsandbytes")
    found = [*machine.bases(pin), machine.optimizer(pin), machine.attention()]
    return {one.what: one.found if one.ok else f"WRONG: {one.found}" for one in found}


# ---- Rows ----


def measure_rows(request: dict) -> Iterator[dict]:
    """The findings of each row, with what memory the model itself took."""
    rows = [Row.of(values) for values in request["rows"]]
    contender_class = contender_named(rows[0].contender)
    import torch

    from gpu.card import SmallCard
    from gpu.contender import Task

    kind = KINDS[request["shape"]]
    card = SmallCard(request["gib"])
    task = Task(Path(request["folder"]), kind.scale, request["steps"], rows)
    try:
        contender = contender_class(task, card)
        card.check()
        loaded = {"loaded": rows[0].job[:4], "checks": contender.checks(), **card.peak()}
    except torch.OutOfMemoryError as error:
        for row in rows:
            yield too_large(row, f"while it loads: {error}")
        return
    yield loaded | {"versions": versions()}
    for row in rows:
        yield from attempts(contender, row, card)


def contender_named(name: str) -> type:
    if name == "unsloth":
        import unsloth  # noqa: F401  # before any library that it patches
    if name == "ours":
        from gpu.ours import Ours
        from llama_lora.train.allocator import expect_all_sizes

        expect_all_sizes()
        return Ours
    if name == "reference":
        from gpu.reference import Reference

        return Reference
    from gpu.sft import Trl, Unsloth

    return Unsloth if name == "unsloth" else Trl


def attempts(contender, row, card) -> Iterator[dict]:
    """A row's findings; whoever cannot compute a micro-batch in parts tries smaller ones."""
    from llama_lora.cli import LocalError
    from llama_lora.model.hardware import out_of_memory

    while True:
        problem = None
        card.start()
        try:
            for found in contender.measure(row):
                yield {"row": row.as_dict(), "status": "measured", **found}
        except (RuntimeError, LocalError) as error:
            if isinstance(error, RuntimeError) and not out_of_memory(error):
                raise
            problem = str(error)  # and not the error itself, which holds on to what was computed
        if problem is None:
            return
        yield too_large(row, problem)
        if row.contender == "ours" or row.batch == 1:
            return
        row = row.halved()


def too_large(row, problem: str) -> dict:
    note = ". ".join(problem.split(". ")[:2])  # torch goes on with the state of its allocator
    return {"row": row.as_dict(), "status": "out of memory", "note": note}


if __name__ == "__main__":
    main()
