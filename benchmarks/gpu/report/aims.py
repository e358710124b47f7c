"""What was aimed at on a card of 16 GB, what was found, and whether that meets it."""

from collections.abc import Iterator

from benchmarks import pages
from benchmarks.gpu.report.findings import fitting, measured, of
from benchmarks.gpu.rows import LONGEST, README
from benchmarks.pages import PRECISIONS

PLAN_ERROR = 0.10
CONTEXT = 40_000
COMMAND_GB = 11  # that the README's command may take, in 10^9 bytes


def aims(results: dict) -> Iterator[tuple[str, str, bool | None]]:
    """Each aim, what was found, and whether that meets it; "" and None if it was not measured."""
    length, _ = LONGEST
    for quantization in ("4bit", "8bit"):
        yield against("reference", quantization, length, 3, results)
    yield longest_batch(results)
    yield memory_of_command(results)
    yield share_of_peak(results)
    yield planned_well(results)
    yield longest_context(results)
    for quantization in ("4bit", "8bit"):
        yield against("unsloth", quantization, length, 1, results)


def longest_batch(results: dict):
    length, batch = LONGEST
    aim = f"int8, {length:,} × {batch} in the memory"
    found = [r for r in of(results, "ours", "8bit", length) if r["row"]["batch"] == batch]
    if not found:
        return aim, "", None
    return aim, f"{pages.gib(found[0]['peak'])}, in {found[0]['parts']} part(s)", True


def memory_of_command(results: dict):
    aim = f"README's command, int8: at most {COMMAND_GB} GB ({pages.gib(COMMAND_GB * 1e9)})"
    found = [row for row in measured(results) if row["row"]["name"].endswith(README)]
    if not found:
        return aim, "", None
    peak, planned = found[0]["peak"], found[0]["planned"]
    return aim, f"{pages.gib(peak)}; the plan says {pages.gib(planned)}", peak <= COMMAND_GB * 1e9


def longest_context(results: dict):
    aim = f"7B NF4, r=32: {CONTEXT:,} tokens of context"
    rows = [row for row in results["rows"].values() if "tokens" in row]
    found = [r for r in rows if (r["row"]["quantization"], r["row"]["base"]) == ("4bit", "7B")]
    if not found:
        return aim, "", None
    reached, ended = found[0]["tokens"] >= CONTEXT, found[0]["fails_at"]
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
        return aim, "", None
    return aim, f"{mine / theirs:.2f}× ({mine:,.0f} against {theirs:,.0f})", mine >= factor * theirs


def share_of_peak(results: dict):
    aim = "half of the device's matrix-product peak"
    ours = [row for row in measured(results, "ours") if "useful_flops" in row]
    if not ours:
        return aim, "", None
    peak = results["device"]["peak_flops"]
    best = max(ours, key=lambda row: row["useful_flops"])
    share = best["useful_flops"] / peak
    return aim, f"{share:.0%} of {peak / 1e12:,.3g} TFLOP/s ({best['row']['name']})", share >= 0.5


def planned_well(results: dict):
    aim = f"the plan within {PLAN_ERROR:.0%} of the peak"
    ratios = [row["planned"] / row["peak"] for row in measured(results) if "planned" in row]
    if not ratios:
        return aim, "", None
    good = sum(abs(ratio - 1) <= PLAN_ERROR for ratio in ratios)
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    return aim, f"{good} of {len(ratios)} rows, worst {worst:.2f}", good == len(ratios)
