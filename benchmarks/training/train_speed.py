"""Labelled tokens a second and memory: this project's training beside the reference recipe.

make .demo/base/config.json && python3 -m benchmarks.training.train_speed --write

Both train the same LoRA on the same base in the same precision, on the same file of pieces. A step
of either is `--tokens` tokens of capacity: rows of the length, which the reference fills with one
padded conversation each and this project packs. They run alternately, `--repeats` times. Timed are
the steps after the first, which also sets things up.
"""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import pages
from benchmarks import training_runs as runs
from benchmarks.matmul_rate import peak_rate
from benchmarks.training import beside_packers, launches
from benchmarks.training.pace import Corpus, arranged, batch, make_corpus, measured, ratios

CHATS = "ShareGPT"
SHORT_LENGTH = 512
LORA = "--lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules q_proj v_proj"


def parse_args() -> argparse.Namespace:
    parser = runs.parser(__doc__, "training-speed.md")
    add = parser.add_argument
    add("--quantization", choices=pages.PRECISIONS, default="8bit", help="precision of the base")
    add("--steps", type=int, default=6, help="steps of a run, of which the first is not timed")
    add("--tokens", type=int, default=2048, help="capacity of a step in tokens")
    add("--repeats", type=int, default=2, help="runs of each, alternating")
    add(
        "--lengths",
        type=int,
        nargs="*",
        default=[512, 1024, 2048],
        help="lengths of rows of real chats",
    )
    add("--no-short", dest="short", action="store_false", help="leave out data/dummy_en.json")
    add("--no-share", dest="share", action="store_false", help="leave out the machine's own rate")
    add(
        "--packers",
        choices=("with", "without", "only"),
        default="with",
        help="the part beside LLaMA-Factory and TRL; only: that part of the page alone",
    )
    add("--checkpointing", action="store_true", help="both recompute activations")
    add("--json", type=Path, metavar="FILE", help="also write what was measured here")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: the first is not timed, so at least 2")
    return args


def main(args: argparse.Namespace) -> None:
    corpora = prepare(args)
    measured_at = f"{pages.origin()}, one run after the other."
    if args.packers == "only":
        results, text = packers(corpora, args)
        pages.publish_section(args, beside_packers.TITLE, measured_at, text)
    else:
        results, parts = whole_page(corpora, args)
        pages.publish(args, "Training speed", measured_at, *parts)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def whole_page(corpora: list[Corpus], args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    results = [compare(corpus, args) for corpus in corpora]
    parts = [comparison(results, args)]
    if args.packers == "with":
        found, text = packers(corpora, args)
        results += found
        parts += [f"## {beside_packers.TITLE}", text]
    if args.share:
        ends = shortest_and_longest(corpora)
        shares = [share_of_machine(corpus, dtype, args) for corpus in ends for dtype in dtypes()]
        results += shares
        longest = shortest_and_longest(corpora)[-1]
        parts += [share_text(shares), profile_text(profile(longest, args)), launches.text()]
    return results, parts


def packers(corpora: list[Corpus], args: argparse.Namespace) -> tuple[list[dict], str]:
    chats = [corpus for corpus in corpora if corpus.name == CHATS]
    found = [beside_packers.compare(corpus, args) for corpus in shortest_and_longest(chats)]
    return found, beside_packers.text(found, args)


def shortest_and_longest(corpora: list[Corpus]) -> list[Corpus]:
    by_length = sorted(corpora, key=lambda corpus: corpus.length)
    return by_length[:: max(1, len(by_length) - 1)]


# ---- Side by side ----


def prepare(args: argparse.Namespace) -> list[Corpus]:
    args.cache.mkdir(parents=True, exist_ok=True)
    chats, _ = runs.real_corpus(args.cache) if args.lengths else (None, None)
    corpora = [make_corpus(CHATS, chats, length, args) for length in args.lengths]
    if args.short:
        corpora.append(make_corpus("short", pages.ROOT / "data/dummy_en.json", SHORT_LENGTH, args))
    return corpora


def compare(corpus: Corpus, args: argparse.Namespace) -> dict:
    """Alternating runs of both on one corpus."""
    reference, own = [], []
    for _ in range(args.repeats):
        reference.append(run_reference(corpus, args))
        own.append(run_ours(corpus, args, args.quantization))
    steps, fill = arranged(own[0])
    data = reference[0].epoch
    padded = data["tokens"] / (data["rows"] * corpus.length)
    return {
        "corpus": corpus.name,
        "length": corpus.length,
        "pieces": corpus.pieces,
        "labelled tokens": corpus.labelled,
        "reference": measured(reference, data["rows"] / batch(corpus, args), padded, corpus),
        "ours": measured(own, steps, fill, corpus),
        "reference's data": data,
    }


def run_reference(corpus: Corpus, args: argparse.Namespace) -> runs.Run:
    return runs.recipe(
        "reference_recipe",
        args.base,
        corpus.path,
        args.cache / "speed-reference",
        *("--max-length", corpus.length, "--batch", batch(corpus, args), "--steps", args.steps),
        *("--quantization", args.quantization),
        *(["--gradient-checkpointing"] if args.checkpointing else []),
    )


def run_ours(corpus: Corpus, args: argparse.Namespace, quantization: str) -> runs.Run:
    out = args.cache / "speed-ours"
    return runs.ours(args.base, corpus.path, out, *our_flags(corpus, args, quantization))


def our_flags(corpus: Corpus, args: argparse.Namespace, quantization: str) -> list:
    return [
        *("--model_max_length", corpus.length, "--quantization", quantization, *LORA.split()),
        *("--per_device_train_batch_size", batch(corpus, args), "--max_steps", args.steps),
        *("--gradient_checkpointing", args.checkpointing, "--save_strategy", "no"),
    ]


def comparison(results: list[dict], args: argparse.Namespace) -> str:
    rows = []
    for result in results:
        reference, own = result["reference"], result["ours"]
        rates = reference["labelled tokens/s"], own["labelled tokens/s"]
        rows.append(
            {
                "corpus": result["corpus"],
                "length": f"{result['length']:,}",
                "reference, labelled tokens/s": f"{rates[0]:.1f}",
                "ours": f"{rates[1]:.1f}",
                "ratio": f"{rates[1] / rates[0]:.2f}×",
                "ratio of each pair": ", ".join(f"{ratio:.2f}" for ratio in ratios(own, reference)),
                "reference, peak memory": pages.gib(reference["peak memory"]),
                "ours, peak memory": pages.gib(own["peak memory"]),
                "reference, fill": f"{reference['fill']:.1%}",
                "ours, fill": f"{own['fill']:.1%}",
            }
        )
    return f"{MEANING.format(args=args)}\n\n{pages.table(rows)}"


MEANING = """\
Both train LoRA of rank 8 on the query and value projections of the same base (`--quantization
{args.quantization}`; gradient checkpointing: {args.checkpointing}), on the same pieces of real
chats (ShareGPT) or of short ones (`data/dummy_en.json`). A step has a capacity of {args.tokens:,}
tokens. There are {args.steps} steps a run, of which the first is not timed, and {args.repeats}
alternating runs of each. The reference is FastChat's recipe: the installed fschat's data module,
every conversation padded to the length, the plain loss; its masks are corrected for this tokenizer,
so that it learns every answer. A labelled token is a token of an answer, counted once: the text
that the pieces of a long answer repeat, which the reference learns again, is not counted again. The
rate is the labelled tokens of the whole corpus, divided by the time of an epoch at the measured
pace. Fill is the share of a step's capacity that holds tokens. Memory is the peak of the whole
process (of the card, if there is one)."""


# ---- What the machine could do ----


def share_of_machine(corpus: Corpus, dtype: str, args: argparse.Namespace) -> dict:
    """The share of the machine's own matrix-product rate that an unquantized base trains at."""
    with switched(dtype):
        run = run_ours(corpus, args, "none")
        peak = peak_rate(args.base, args.tokens)
    steps, fill = arranged(run)
    pace = measured([run], steps, fill, corpus)
    tokens = fill * corpus.length * batch(corpus, args) / run.seconds_per_step
    body, head, attention = operands(args.base)
    rate = 4 * (body * tokens + head * pace["labelled tokens/s"])
    rate += 6 * attention * corpus.attended / corpus.tokens * tokens
    return {
        "corpus": corpus.name,
        "length": corpus.length,
        "dtype": dtype,
        "tokens/s": tokens,
        "labelled tokens/s": pace["labelled tokens/s"],
        "seconds per step": run.seconds_per_step,
        "body M": body / 1e6,
        "head M": head / 1e6,
        "training GFLOP/s": rate / 1e9,
        "product GFLOP/s": peak / 1e9,
        "share": rate / peak,
        "peak memory": run.peak_memory,
    }


def dtypes() -> list[str]:
    """fp32, and the one that this machine trains in; on a card that one alone."""
    import torch

    from llama_lora.hardware.device import compute_dtype, dtype_name

    fastest = dtype_name(compute_dtype())
    return [fastest] if torch.cuda.is_available() or fastest == "float32" else ["float32", fastest]


@contextmanager
def switched(dtype: str) -> Iterator[None]:
    """Meanwhile this machine computes in that dtype, and what it starts."""
    from llama_lora.hardware.device import DTYPE_SWITCH

    before = os.environ.get(DTYPE_SWITCH)
    os.environ[DTYPE_SWITCH] = dtype
    try:
        yield
    finally:
        del os.environ[DTYPE_SWITCH]
        if before is not None:
            os.environ[DTYPE_SWITCH] = before


def operands(base: Path) -> tuple[int, int, int]:
    """Weights of the linear layers, of the output head, and numbers of a token's queries."""
    config = json.loads((base / "config.json").read_text())
    hidden = config["hidden_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = hidden * (2 * queries + 2 * keys + 3 * config["intermediate_size"])
    layers = config["num_hidden_layers"]
    return layers * layer, hidden * config["vocab_size"], layers * queries


def share_text(shares: list[dict]) -> str:
    rows = [
        {
            "corpus": share["corpus"],
            "length": f"{share['length']:,}",
            "dtype": share["dtype"],
            "tokens/s": f"{share['tokens/s']:,.0f}",
            "labelled tokens/s": f"{share['labelled tokens/s']:,.0f}",
            "useful GFLOP/s": f"{share['training GFLOP/s']:.1f}",
            "best product, GFLOP/s": f"{share['product GFLOP/s']:.1f}",
            "share": f"{share['share']:.0%}",
        }
        for share in shares
    ]
    return (
        f"{SHARE.format(**{name[:4]: shares[0][name] for name in WEIGHTS})}\n\n{pages.table(rows)}"
    )


WEIGHTS = "body M", "head M"
SHARE = """\
## Share of the machine's own rate

The rate at which an unquantized base trains, beside the rate that the fastest of the model's own
products reaches by itself in the same dtype (`torch.mm`, several shapes, best call, right after the
training). Useful work is 2 FLOP per weight forward and 2 backward (the weights are frozen, so the
backward pass computes only the gradient of the input): the {body:.1f} M weights of the linear
layers for every token, the {head:.1f} M of the head for labelled tokens only; and the causal half
of attention's products, two forward and four backward. LoRA's own products and whatever is computed
twice do not count."""


def profile(corpus: Corpus, args: argparse.Namespace) -> list[dict]:
    """Where the time of one step of the same training goes."""
    out = args.cache / "speed-profiled"
    run = runs.train(
        out,
        *runs.module("profiled_training"),
        *runs.our_arguments(args.base, corpus.path, out),
        *our_flags(corpus, args, "none"),
        *("--max_steps", 2),
    )
    lines = [
        line.split("\t")[1:] for line in run.output.splitlines() if line.startswith("operator\t")
    ]
    return [
        {
            "operator": f"`{name}`",
            "calls": calls,
            "seconds": seconds,
            "share": f"{float(share):.1%}",
        }
        for name, calls, seconds, share in lines
    ]


def profile_text(operators: list[dict]) -> str:
    return f"""\
The operators in which one step of it spends the most time (`torch.profiler`, their own time):

{pages.table(operators)}"""


if __name__ == "__main__":
    main(parse_args())
