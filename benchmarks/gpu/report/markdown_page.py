"""The findings of gpu_16gb.py as Markdown: a part for each card, ours beside the reference."""

import math

from benchmarks import pages
from benchmarks.gpu.report.aims import aims
from benchmarks.gpu.report.findings import fitting, measured
from benchmarks.gpu.rows import CHECKS, KINDS, SEARCHING, Row, all_rows
from benchmarks.pages import PRECISIONS

NOT_YET = "not measured yet"
NOTHING = "–"
NOT_HERE = "not on this card"
# What others tell of cards of 16 GB, in 4 bits with rank 32: the tokens of the longest context, and
# a training of TinyLlama in a public notebook.
PUBLIC_CONTEXT, PUBLIC_TRAINING = {"8B": "40,724"}, {"1.1B": "2,441 tokens/s in 13.5 GB"}
OPERATORS = 3  # that are named of each step
NO_CARD = {
    "device": {"name": "No card yet", "capability": None},
    "settings": {"shape": "full", "gib": 14.6},
    "rows": {},
    "models": {},
    "checks": {},
}


def line(name: str, row: dict) -> str:
    """A row as it is told while the benchmark goes on."""
    told = [name, row["status"]]
    if "note" in row:
        told.append(row["note"])
    if "peak" in row:
        told.append(pages.gib(row["peak"]))
    if "labelled_per_second" in row:
        told.append(f"{row['labelled_per_second']:,.0f} labelled tokens/s")
    if "first_token" in row:
        told.append(f"first token after {row['first_token']:.3f} s")
    if "tokens" in row:
        told.append(f"{row['tokens']:,} tokens fit")
    return " | ".join(told)


def page(found: list[dict]) -> str:
    """The page of all cards; without one, what will be measured."""
    parts = [TITLE, *[part for results in found or [NO_CARD] for part in of_card(results)]]
    return "\n\n".join(pages.wrapped(part) for part in parts if part) + "\n"


TITLE = """\
# What cards do

`make gpu` on a machine with a CUDA card measures this, in runs of 8.5 minutes that continue where
the last one ended, the most telling rows first (docs/results/README.md). The page is written from
the files in docs/results/, one per card.

Bases have random weights in the sizes of Llama 2 7B, Llama 3 8B and TinyLlama 1.1B. The tokens are
random, with as many in each conversation and answer as in real pieces of ShareGPT, counted with
SmolLM2's tokenizer. The process is limited to the memory named, of which CUDA itself takes some.
Peak memory is what torch reserved plus what CUDA took. A labelled token is one of an answer. Rates
are those of an epoch at the pace of the timed steps, so padding costs time and does not count as
tokens. The reference is FastChat's recipe: rows padded to the length, the plain loss, fp16, all
layers recomputed unless the row says otherwise; like this project, it lets CUDA's blocks grow
(`expandable_segments`). If it runs out of memory, it is tried again with half as many rows. Planned
is what the plan chooses and predicts for the memory named, as with `--dry_run`."""


def of_card(results: dict) -> list[str]:
    return [
        heading(results),
        part("Aims", aims_rows(results)),
        part("Training", [speed_row(row, results) for row in own_rows(results, "speed")]),
        part("Answers", [answers_row(row, results) for row in own_rows(results, "answers")]),
        part("The longest context", context_rows(results), CONTEXT),
        part("Does it compute correctly?", checks_rows(results)),
        part("The plan's time", speed_rows(results), SPEED),
        part("Where the time of a micro-batch goes", profile_rows(results)),
        part("Other trainers", [other_row(row) for row in others(results)]),
    ]


def part(title: str, rows: list[dict], text: str = "") -> str:
    return "\n\n".join(filter(None, [f"### {title}", text, pages.table(rows)])) if rows else ""


def heading(results: dict) -> str:
    device, settings = results["device"], results["settings"]
    title = f"## {device['name']}"
    if "date" not in results:
        return f"{title}\n\nNobody has run it on a card yet."
    capability = ".".join(map(str, device["capability"] or ())) or "none"
    tried_out = "" if settings["shape"] == "full" else TRIED_OUT
    return f"""\
{title}

{results["date"]}, {results["processor"]}; capability {capability}, driver {device["driver"]}, CUDA
{device["cuda"]}; limited to {settings["gib"]:g} GiB. {versions(results)}{tried_out}"""


def versions(results: dict) -> str:
    """Of the packages, and who ran with which where they differ."""
    told: dict[str, list[str]] = {}
    for job, model in results["models"].items():
        packages = ", ".join(f"{name} {version}" for name, version in model["versions"].items())
        told.setdefault(packages, []).append(job)
    if len(told) == 1:
        return f"{next(iter(told))}."
    return " ".join(f"{packages}: {'; '.join(jobs)}." for packages, jobs in told.items())


TRIED_OUT = " **The bases are tiny ones that only try out the code; these figures mean nothing.**"


def aims_rows(results: dict) -> list[dict]:
    met = {True: "yes", False: "no", None: NOT_YET}
    return [{"aim": a, "found": f or NOT_YET, "met": met[m]} for a, f, m in aims(results)]


# ---- Ours beside the reference ----


def own_rows(results: dict, measures: str) -> list[Row]:
    """Ours that measure this, in the order of their sizes."""
    kind = "ours", measures
    return [row for row in rows_of(results) if (row.contender, row.measures) == kind]


def rows_of(results: dict) -> list[Row]:
    return [row for row in all_rows(KINDS[results["settings"]["shape"]]) if row != CHECKS]


def speed_row(row: Row, results: dict) -> dict:
    mine, theirs = found_of(row, results), beside(row, results)
    rate = "labelled_per_second"
    both = is_measured(mine) and is_measured(theirs)
    return {
        "training": row.name.removeprefix("ours "),
        "tokens/s": cell(mine, "tokens_per_second", number),
        "labelled tokens/s": cell(mine, rate, number),
        "reference": cell(theirs, rate, number) + fewer_rows(row, theirs),
        "ours ÷ reference": f"{mine[rate] / theirs[rate]:.2f}" if both else NOTHING,
        "peak": cell(mine, "peak", pages.gib),
        "planned": cell(mine, "planned", pages.gib) if is_measured(mine) else NOTHING,
        "planned ÷ peak": f"{mine['planned'] / mine['peak']:.2f}" if is_measured(mine) else NOTHING,
        "reference's peak": cell(theirs, "peak", pages.gib),
        "others report": PUBLIC_TRAINING.get(row.base, NOTHING),
        "how": how_computed(mine),
    }


def found_of(row: Row, results: dict) -> dict | None:
    """What was found of a row, if it is for this card."""
    found = results["rows"].get(row.name)
    if found is None and not row.is_for(results["device"]["capability"]):
        return {"status": NOT_HERE}
    return found


def beside(row: Row, results: dict) -> dict | None:
    """What was found of the reference with the same name, or with the most rows that fit."""
    name = row.name.replace("ours", "reference", 1)
    other = next((other for other in rows_of(results) if other.name == name), None)
    if other is None:
        return {"status": NOTHING}
    found = found_of(other, results)
    while other.can_be_halved and not is_measured(found):
        other = other.halved()
        found = results["rows"].get(other.name, found)
    return found


def fewer_rows(row: Row, theirs: dict | None) -> str:
    if not is_measured(theirs) or theirs["row"]["batch"] == row.batch:
        return ""
    return f" (× {theirs['row']['batch']})"


def is_measured(found: dict | None) -> bool:
    return found is not None and found["status"] in ("measured", SEARCHING)


def cell(found: dict | None, key: str, shown) -> str:
    """A figure, or why there is none."""
    if found is None:
        return NOT_YET
    return shown(found[key]) if key in found else found["status"]


def number(value: float) -> str:
    return f"{value:,.0f}"


def how_computed(row: dict | None) -> str:
    """What was set up, or what went wrong."""
    if row is None:
        return NOTHING
    if not is_measured(row):
        return row.get("note", NOTHING)
    told = [f"{row['dtype']}", *row.get("set_up", [])]
    told += [f"in {row['parts']} parts"] * (row.get("parts", 1) > 1)
    return "; ".join(told + ["WRONG: the loss is not finite"] * (not math.isfinite(row["loss"])))


def answers_row(row: Row, results: dict) -> dict:
    mine, theirs = found_of(row, results), beside(row, results)
    return {
        "base": PRECISIONS[row.quantization],
        "first token, s": cell(mine, "first_token", "{:.3f}".format),
        "tokens/s": cell(mine, "answer_tokens_per_second", "{:.1f}".format),
        "peak": cell(mine, "peak", pages.gib),
        "reference's first token, s": cell(theirs, "first_token", "{:.3f}".format),
        "reference's tokens/s": cell(theirs, "answer_tokens_per_second", "{:.1f}".format),
        "reference's peak": cell(theirs, "peak", pages.gib),
    }


# ---- What only ours has ----


def context_rows(results: dict) -> list[dict]:
    return [context_row(row, found_of(row, results)) for row in own_rows(results, "context")]


def context_row(row: Row, found: dict | None) -> dict:
    if found is not None and "tokens" not in found:
        found = found | {"set_up": [found.get("note", "")]}
    return {
        "base": f"{row.base} {PRECISIONS[row.quantization]}",
        "fits, tokens": fitting(found) if is_measured(found) else cell(found, "tokens", number),
        "does not": does_not_fit(found) if is_measured(found) else NOTHING,
        "others report": told_by_others(row),
        "peak": cell(found, "peak", pages.gib),
        "planned": cell(found, "planned", pages.gib),
        "tokens/s": cell(found, "tokens_per_second", number),
        "whole conversations": cell(found, "whole_conversations", "{:.1%}".format),
        "how": "; ".join(found["set_up"]) if found else NOTHING,
    }


def does_not_fit(found: dict) -> str:
    """The shortest that was tried and did not fit, and why."""
    tokens = found["fails_at"]
    return f"{tokens:,}, for lack of {found['lacking']}" if tokens else NOTHING


def told_by_others(row: Row) -> str:
    return PUBLIC_CONTEXT.get(row.base, NOTHING) if row.quantization == "4bit" else NOTHING


CONTEXT = """\
The longest single example for which a step fits, with LoRA of rank 32 on all linear layers and
8-bit AdamW. Whole conversations: the share of real conversations that are no longer."""


def checks_rows(results: dict) -> list[dict]:
    outcomes: dict[tuple[str, str], list[str]] = {}
    for job, model in results["models"].items():
        for check in model["checks"].items():
            outcomes.setdefault(check, []).append(job)
    found = [{"what": what, "found": found} for what, found in results["checks"].items()]
    found += [
        {"what": what, "found": f"{found} ({'; '.join(jobs)})"}
        for (what, found), jobs in outcomes.items()
    ]
    return found or [{"what": "everything that tests check on a CPU", "found": NOT_YET}]


def speed_rows(results: dict) -> list[dict]:
    rows = [row for row in measured(results) if "operations_per_second" in row]
    rate = results["device"].get("planner_rate")
    return [
        {
            "training": row["row"]["name"],
            "share of the rate": f"{row['operations_per_second'] / rate:.0%}",
            "assumed": f"{row['assumed_share']:.0%}",
            "layers recomputed": f"{row['recomputed']} of {row['layers']}",
            "in the plan": str(row.get("planned_recomputed", NOTHING)),
        }
        for row in rows
    ]


SPEED = """\
The plan's time depends on the share of the rate: a training's operations per second, divided by the
rate that the plan measures on the device. Beside it is the share that the plan assumes."""


def profile_rows(results: dict) -> list[dict]:
    return [profile_row(row) for row in measured(results) if row.get("profiled_seconds")]


def profile_row(row: dict) -> dict:
    longest = [
        f"`{name}` {seconds / row['profiled_seconds']:.0%}"
        for name, _, seconds in row["operators"][:OPERATORS]
    ]
    return {
        "training": row["row"]["name"],
        "kernels launched": number(row["launches"]),
        "waits for the card": number(row["waits"]),
        "the card computes": NOTHING if row["busy"] is None else f"{row['busy']:.0%} of the time",
        "most of it in": ", ".join(longest),
    }


def others(results: dict) -> list[dict]:
    known = "ours", "reference"
    return [row for row in results["rows"].values() if row["row"]["contender"] not in known]


def other_row(row: dict) -> dict:
    return {
        "training": row["row"]["name"],
        "labelled tokens/s": cell(row, "labelled_per_second", number),
        "peak": cell(row, "peak", pages.gib),
        "note": row.get("note", NOTHING),
    }
