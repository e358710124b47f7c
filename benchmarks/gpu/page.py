"""The findings of gpu_16gb.py as Markdown: the aims, the rows, the plan, where the time goes."""

import math
from collections.abc import Iterator

import pages
from pages import PRECISIONS

from gpu.rows import FULL, README, SEARCHING
from llama_lora.train.pace import EFFICIENCY

LONGEST = FULL[-1][0]
PLAN_ERROR = 0.10
CONTEXT = 40_000
COMMAND_GB = 11  # that the README's command may take, in 10^9 bytes
NOT_HERE = "–"


def line(name: str, row: dict) -> str:
    """A row as it is told while the benchmark goes on."""
    told = [name, row["status"]]
    if "note" in row:
        told.append(row["note"])
    if "peak" in row:
        told.append(pages.gib(row["peak"]))
    if "labelled_per_second" in row:
        told.append(f"{row['labelled_per_second']:,.0f} labelled tokens/s")
    if "tokens" in row:
        told.append(f"{row['tokens']:,} tokens fit")
    return " | ".join(told)


def page(results: dict) -> str:
    """The whole page."""
    parts = [heading(results), aims_text(results), training_text(results), plan_text(results)]
    parts += [context_text(results), profile_text(results), checks_text(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(results: dict) -> str:
    device, settings = results["device"], results["settings"]
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    tried_out = "" if settings["shape"] == "7b" else TRIED_OUT
    absent = "".join(f" {name} was not installed, so it has no rows." for name in results["absent"])
    return f"""\
# LoRA on a {settings["shape"]} base in {settings["gib"]:g} GiB: {device["name"]}

`python3 benchmarks/gpu_16gb.py` on {device["name"]} ({results["processor"]}), {results["date"]};
CUDA {device["cuda"]}, {packages}.{tried_out}{absent}{other_versions(results)}

{MEANING.format(steps=settings["steps"], gib=settings["gib"])}"""


def other_versions(results: dict) -> str:
    """Who ran with other versions than the rest."""
    told = ""
    for job, model in results["models"].items():
        if model["versions"] != results["versions"]:
            packages = ", ".join(f"{name} {v}" for name, v in model["versions"].items())
            told += f" {job} ran with {packages}."
    return told


TRIED_OUT = " **The base is a tiny one that tries the code out; its figures mean nothing.**"
MEANING = """\
The base has random weights, the tokens are random, and their number in each conversation and
answer is that of real pieces of ShareGPT (counted by SmolLM2's tokenizer). Each process is held to
{gib:g} GiB, of which CUDA itself takes its part. Peak memory is what torch reserved plus what CUDA
took; tensors is the most that tensors held of it. Timed are {steps} steps after one that sets
things up. A labelled token is one of an answer; rates are those of an epoch at the pace of the
timed steps, so that padding counts as time and not as tokens. The reference is FastChat's recipe:
rows padded to the length, the plain loss, all layers recomputed, fp16. Where it runs out of memory
it is tried again with half as many rows. The peak of the device is that of the fastest of the
base's own matrix products; its share counts 2 FLOP a weight forward and 2 backward (the head for
labelled tokens alone), and nothing that is computed twice."""


# ---- The aims ----


def aims_text(results: dict) -> str:
    rows = [
        {"aim": aim, "found": found, "met": {True: "yes", False: "no", None: NOT_HERE}[met]}
        for aim, found, met in aims(results)
    ]
    return f"## Aims\n\n{pages.table(rows)}"


def aims(results: dict) -> Iterator[tuple[str, str, bool | None]]:
    """What was aimed at, what was found, and whether that meets it; None if it was not measured."""
    for quantization in PRECISIONS:
        yield against("reference", quantization, LONGEST, 3, results)
    yield longest_batch(results)
    yield memory_of_command(results)
    yield share_of_peak(results)
    yield planned_well(results)
    yield longest_context(results)
    for quantization in PRECISIONS:
        yield against("unsloth", quantization, LONGEST, 1, results)


def longest_batch(results: dict):
    length, batch = FULL[-1]
    aim = f"int8, {length:,} × {batch} in the memory"
    found = [r for r in of(results, "ours", "8bit", length) if r["row"]["batch"] == batch]
    if not found:
        return aim, NOT_HERE, None
    return aim, f"{pages.gib(found[0]['peak'])}, in {found[0]['parts']} part(s)", True


def memory_of_command(results: dict):
    aim = f"README's command, int8: at most {COMMAND_GB} GB ({pages.gib(COMMAND_GB * 1e9)})"
    found = [row for row in measured(results) if row["row"]["name"].endswith(README)]
    if not found:
        return aim, NOT_HERE, None
    peak, planned = found[0]["peak"], found[0]["planned"]
    return aim, f"{pages.gib(peak)}; the plan says {pages.gib(planned)}", peak <= COMMAND_GB * 1e9


def longest_context(results: dict):
    aim = f"NF4, r=32: {CONTEXT:,} tokens of context"
    rows = [row for row in results["rows"].values() if row["row"]["search"] and "tokens" in row]
    found = [row for row in rows if row["row"]["quantization"] == "4bit"]
    if not found:
        return aim, NOT_HERE, None
    reached, ended = found[0]["tokens"] >= CONTEXT, found[0]["status"] == "measured"
    return aim, fitting(found[0]), reached if reached or ended else None


def against(other: str, quantization: str, window: int, factor: float, results: dict):
    aim = f"{PRECISIONS[quantization]}, {window:,} tokens: {factor:g}× {other}'s labelled tokens/s"
    mine, theirs = (
        max(
            (row["labelled_per_second"] for row in of(results, name, quantization, window)),
            default=None,
        )
        for name in ("ours", other)
    )
    if mine is None or theirs is None:
        return aim, NOT_HERE, None
    return aim, f"{mine / theirs:.2f}× ({mine:,.0f} against {theirs:,.0f})", mine >= factor * theirs


def share_of_peak(results: dict):
    aim, peak = "half of the device's matrix-product peak", results["device"]["peak_flops"]
    ours = [row for row in measured(results, "ours") if "useful_flops" in row]
    if not ours:
        return aim, NOT_HERE, None
    best = max(ours, key=lambda row: row["useful_flops"])
    share = best["useful_flops"] / peak
    return aim, f"{share:.0%} of {peak / 1e12:,.3g} TFLOP/s ({best['row']['name']})", share >= 0.5


def planned_well(results: dict):
    aim = f"the plan within {PLAN_ERROR:.0%} of the peak"
    ratios = [row["planned"] / row["peak"] for row in measured(results) if "planned" in row]
    if not ratios:
        return aim, NOT_HERE, None
    good = sum(abs(ratio - 1) <= PLAN_ERROR for ratio in ratios)
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    return aim, f"{good} of {len(ratios)} rows, worst {worst:.2f}", good == len(ratios)


# ---- Tables ----


def training_text(results: dict) -> str:
    rows = [training_row(row, results) for row in speeds(results)]
    return f"## Memory and speed\n\n{pages.table(rows)}" if rows else ""


def training_row(row: dict, results: dict) -> dict:
    asked, done = row["row"], row["status"] == "measured"
    peak_flops = results["device"]["peak_flops"]
    how = [row.get("note", "")] if not done else how_computed(row)
    return {
        "who": asked["contender"],
        "base": PRECISIONS[asked["quantization"]],
        "computes in": row.get("dtype", NOT_HERE),
        "length × rows": f"{asked['length']:,} × {asked['batch']}",
        "peak memory": pages.gib(row["peak"]) if done else row["status"],
        "tensors": pages.gib(row["allocated"]) if done else NOT_HERE,
        "tokens/s": f"{row['tokens_per_second']:,.0f}" if done else NOT_HERE,
        "labelled tokens/s": f"{row['labelled_per_second']:,.0f}" if done else NOT_HERE,
        "share of peak": f"{row['useful_flops'] / peak_flops:.0%}" if done else NOT_HERE,
        "how": "; ".join(filter(None, [asked["name"].partition(", ")[2], *how])),
    }


def how_computed(row: dict) -> list[str]:
    parts = row.get("parts", 1)
    told = row.get("set_up", []) + [f"in {parts} parts"] * (parts > 1)
    return told + ["WRONG: the loss is not finite"] * (not math.isfinite(row["loss"]))


def plan_text(results: dict) -> str:
    rate = results["device"]["planner_rate"]
    rows = [plan_row(row, rate) for row in measured(results) if "planned" in row]
    return f"## The plan beside what was measured\n\n{PLAN}\n\n{pages.table(rows)}" if rows else ""


def plan_row(row: dict, rate: float) -> dict:
    ratio, speed = row["planned"] / row["peak"], row.get("operations_per_second")
    return {
        "row": row["row"]["name"],
        "planned": pages.gib(row["planned"]),
        "measured": pages.gib(row["peak"]),
        "ratio": f"{ratio:.2f}",
        f"within {PLAN_ERROR:.0%}": "yes" if abs(ratio - 1) <= PLAN_ERROR else "no",
        "layers recomputed": f"{row['recomputed']} of {row['layers']}",
        "in the plan": str(row.get("planned_recomputed", NOT_HERE)),
        "share of the rate": f"{speed / rate:.0%}" if speed else NOT_HERE,
        "assumed": f"{EFFICIENCY[row['row']['quantization']]:.0%}",
    }


PLAN = """\
Planned is what the planner says that a training takes with as many layers recomputed, parts and
tiles as it then had; beside it, how many layers the planner would recompute. The share of the rate
is what the planner's time depends on: its operations a second over the rate that it measures, and
what it assumes for that."""


def context_text(results: dict) -> str:
    rows = [context_row(row) for row in results["rows"].values() if row["row"]["search"]]
    return f"## The longest context\n\n{LONGEST_CONTEXT}\n\n{pages.table(rows)}" if rows else ""


def context_row(row: dict) -> dict:
    base = {"base": PRECISIONS[row["row"]["quantization"]]}
    if "tokens" not in row:
        rest = ("does not", "peak memory", "tokens/s", "whole conversations")
        missing = dict.fromkeys(rest, NOT_HERE)
        return base | {"fits, tokens": row["status"], **missing, "how": row["note"]}
    return base | {
        "fits, tokens": fitting(row),
        "does not": f"{row['fails_at']:,}" if row["fails_at"] else NOT_HERE,
        "peak memory": pages.gib(row["peak"]),
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "whole conversations": f"{row['whole_conversations']:.1%}",
        "how": "; ".join(row["set_up"]),
    }


def fitting(row: dict) -> str:
    """The longest context that fits, as far as the search has come."""
    return f"{row['tokens']:,}{' or more' if row['status'] == SEARCHING else ''}"


LONGEST_CONTEXT = """\
One example alone, LoRA of rank 32 on all linear layers, AdamW with states of 8 bits: the longest
for which a step fits. Whole conversations is the share of real ones that are no longer."""


def profile_text(results: dict) -> str:
    parts = []
    for row in measured(results):
        if not row.get("profiled_seconds"):  # not profiled, or the profiler saw no kernel
            continue
        busy = "" if row["busy"] is None else f"; the device computes in {row['busy']:.0%} of it"
        operators = [
            {
                "operator": f"`{name}`",
                "calls": calls,
                "seconds": f"{seconds:.3f}",
                "share": f"{seconds / row['profiled_seconds']:.1%}",
            }
            for name, calls, seconds in row["operators"]
        ]
        told = f"One step of {row['row']['name']}{busy}:"
        parts.append(f"{told}\n\n{pages.table(operators)}")
    return "\n\n".join(["## Where the time goes", *parts]) if parts else ""


def checks_text(results: dict) -> str:
    rows = [{"what": what, "found": found} for what, found in results["device"]["checks"].items()]
    outcomes: dict[tuple[str, str], list[str]] = {}
    for job, model in results["models"].items():
        for check in model["checks"].items():
            outcomes.setdefault(check, []).append(job)
    rows += [
        {"what": what, "found": f"{found} ({'; '.join(jobs)})"}
        for (what, found), jobs in outcomes.items()
    ]
    return f"## Does it compute right?\n\n{pages.table(rows)}"


# ---- Rows by kind ----


def measured(results: dict, contender: str | None = None) -> list[dict]:
    return [
        row
        for row in results["rows"].values()
        if row["status"] == "measured" and contender in (None, row["row"]["contender"])
    ]


def of(results: dict, contender: str, quantization: str, window: int) -> list[dict]:
    """Measured rows of a contender, those of old cards' ways left out."""
    return [
        row
        for row in measured(results, contender)
        if (row["row"]["quantization"], row["row"]["window"]) == (quantization, window)
        and row["row"]["kernel"] == "any"
    ]


def speeds(results: dict) -> list[dict]:
    return [row for row in results["rows"].values() if not row["row"]["search"]]
