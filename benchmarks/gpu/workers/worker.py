"""A process of gpu_16gb.py: answers requests on stdin with findings as JSON on stdout."""

import gc
import json
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu.reasons import first_line
from benchmarks.gpu.rows import KINDS, Row

PACKAGES = "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "unsloth"
MARK = "gpu_16gb "  # what a line of findings begins with, among whatever libraries print


def main() -> None:
    """Each request is a line; at the end of its findings is told how many bytes are still held."""
    for line in sys.stdin:
        try:
            for findings in answer(json.loads(line)):
                tell(findings)
        except Exception as error:
            tell({"failed": first_line(error)})
            raise
        tell({"held": held()})


def tell(findings: dict) -> None:
    """On a line of its own, whatever a library has printed before."""
    print(f"\n{MARK}{json.dumps(findings)}", flush=True)


def answer(request: dict) -> Iterator[dict]:
    """What is asked for.

    Args:
        request: `look`: whether all is there, and what the device is; or, with the `cache` for
            bases and their `shape`, `rates`: how fast it is; `checks`: whether it computes right,
            but for those that it lists; or `rows`, with the `gib` that they are held to and the
            `steps` that are timed.
    """
    if "look" in request:
        from benchmarks.gpu.workers import imports

        missing = imports.missing()
        if missing:
            yield {"missing": missing}
        else:
            scripts = imports.missing_for_scripts()
            yield {"missing": [], "missing_for_scripts": scripts, "device": device()}
    elif "rates" in request:
        yield rates(Path(request["cache"]), request["shape"])
    elif "checks" in request:
        from benchmarks.gpu.workers import checks

        yield from checks.outcomes(Path(request["cache"]), request["shape"], request["checks"])
    else:
        yield from measure_rows(request)


def versions() -> dict[str, str]:
    """Of the packages that trainings are made of."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def held() -> int:
    """Bytes of the card that are still held, when all that was measured is let go of."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch._C._host_emptyCache()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


# ---- The device ----


def device() -> dict:
    """What is here."""
    import torch

    from llama_lora.hardware import nvidia_driver
    from llama_lora.hardware.device import compute_dtype, dtype_name, present

    card = present()
    return {
        "name": card.name,
        "capability": card.capability,
        "memory": card.memory,
        "dtype": dtype_name(compute_dtype()),
        "cuda": torch.version.cuda,
        "driver": next(iter(nvidia_driver.ask("driver_version")), None),
    }


def rates(cache: Path, shape: str) -> dict:
    """How fast the device computes the products of the first base, which is made."""
    import torch

    from benchmarks.gpu.contenders import base
    from benchmarks.matmul_rate import peak_rate
    from llama_lora.hardware.device import compute_dtype
    from llama_lora.model.folder.shape import shape_of
    from llama_lora.train.plan import time_estimate

    scale = KINDS[shape]["7B"].scale
    folder, on = base.made(cache, shape, "7B"), "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "peak_flops": peak_rate(folder, 8192 // scale, 0.5 / scale),
        "planner_rate": time_estimate.measured_rate(shape_of(folder), compute_dtype(), on),
    }


# ---- Rows ----


def measure_rows(request: dict) -> Iterator[dict]:
    """The findings of each row, with what memory the model itself took."""
    rows = [Row.of(values) for values in request["rows"]]
    first, kind = rows[0], KINDS[request["shape"]][rows[0].base]
    contender_class = contender_of(first)
    from benchmarks.gpu.contenders import base
    from benchmarks.gpu.contenders.card import SmallCard
    from benchmarks.gpu.contenders.contender import Task
    from llama_lora.cli import out_of_memory

    folder = base.made(Path(request["cache"]), request["shape"], first.base)
    with SmallCard(request["gib"]) as card:
        task = Task(folder, kind.scale, request["steps"], rows)
        try:
            contender = contender_class(task, card)
            card.check()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            for row in rows:
                yield too_large(row, f"while it loads: {error}")
            return
        loaded = [first.contender, first.base, first.quantization, first.dtype, first.rank]
        loaded += ["answers"] * (first.measures == "answers")
        yield {
            "loaded": loaded,
            "checks": contender.checks(),
            **card.peak(),
            "versions": versions(),
        }
        for row in rows:
            yield from attempts(contender, row, card)


def contender_of(row: Row) -> type:
    if row.contender == "unsloth":
        import unsloth  # noqa: F401  # before any library that it patches

        from benchmarks.gpu.contenders.trl_sft import Unsloth as Found
    elif row.contender == "TRL":
        from benchmarks.gpu.contenders.trl_sft import Trl as Found
    elif row.measures == "answers":
        from benchmarks.gpu.contenders import answers

        Found = answers.Ours if row.contender == "ours" else answers.Reference
    elif row.contender == "ours":
        from benchmarks.gpu.contenders.ours import Ours as Found
    else:
        from benchmarks.gpu.contenders.reference import Reference as Found
    return Found


def attempts(contender, row, card) -> Iterator[dict]:
    """A row's findings; whoever cannot compute a micro-batch in parts tries smaller ones."""
    from llama_lora.cli import LocalError, out_of_memory

    while True:
        problem = None
        yield {"begins": row.as_dict()}
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
        if not row.can_be_halved:
            return
        row = row.halved()


def too_large(row, problem: str) -> dict:
    note = ". ".join(problem.split(". ")[:2])  # torch goes on with the state of its allocator
    return {"row": row.as_dict(), "status": "out of memory", "note": note}


if __name__ == "__main__":
    main()
