"""The part of train_speed about trainers that pack as well: LLaMA-Factory and TRL's SFTTrainer."""

import argparse

from benchmarks import pages
from benchmarks import training_runs as runs
from benchmarks.training.contenders import llama_factory
from benchmarks.training.pace import Corpus, arranged, batch, measured, ratios

TITLE = "Beside LLaMA-Factory and TRL"
NAMES = {"ours": "ours", "llama-factory": "LLaMA-Factory", "trl": "TRL"}


def compare(corpus: Corpus, args: argparse.Namespace) -> dict:
    """Alternating runs of all on one corpus."""
    trainings = {name: [] for name in NAMES}
    for _ in range(args.repeats):
        for name, found in trainings.items():
            found.append(run(name, corpus, args))
    return {
        "corpus": corpus.name,
        "length": corpus.length,
        "answer tokens": corpus.labelled,
        "packers": {name: pace(name, found, corpus, args) for name, found in trainings.items()},
    }


def run(name: str, corpus: Corpus, args: argparse.Namespace) -> runs.Run:
    out = args.cache / f"speed-{name}"
    if name == "ours":
        return runs.ours(args.base, corpus.path, out, *our_flags(corpus, args))
    flags = [
        *("--settings", "packed", "--length", corpus.length, "--batch", batch(corpus, args)),
        *("--steps", args.steps, "--quantization", "none"),
    ]
    if name == "llama-factory":
        return llama_factory.train(args.base, corpus.path, out, args.cache, *flags)
    return runs.recipe("trl_recipe", args.base, corpus.path, out, *flags)


def our_flags(corpus: Corpus, args: argparse.Namespace) -> list:
    """The LoRA is our default, which the recipes' `packed` settings repeat."""
    return [
        *("--model_max_length", corpus.length, "--quantization", "none"),
        *("--per_device_train_batch_size", batch(corpus, args), "--max_steps", args.steps),
        *("--gradient_checkpointing", False, "--save_strategy", "no"),
    ]


def pace(name: str, trainings: list[runs.Run], corpus: Corpus, args: argparse.Namespace) -> dict:
    """The rate and memory of a contender, and what it learns in an epoch."""
    if name == "ours":
        steps, _ = arranged(trainings[0])
        tokens, labelled = corpus.tokens, corpus.labelled
    else:
        epoch = trainings[0].epoch
        steps = epoch["rows"] / batch(corpus, args)
        tokens, labelled = epoch["tokens"], epoch["labelled_tokens"]
    found = measured(trainings, steps, tokens / (steps * args.tokens), corpus)
    seconds = corpus.labelled / found["labelled tokens/s"]
    return found | {
        "tokens": tokens,
        "labelled tokens": labelled,
        "tokens/s": tokens / seconds,
        "own labels/s": labelled / seconds,
    }


def text(results: list[dict], args: argparse.Namespace) -> str:
    rows = [
        {
            "length": f"{result['length']:,}",
            "trainer": NAMES[name],
            "answer tokens/s": f"{found['labelled tokens/s']:.0f}",
            "ours beside it": faster(result["packers"]["ours"], found),
            "tokens/s": f"{found['tokens/s']:.0f}",
            "tokens an epoch": f"{found['tokens']:,}",
            "labelled": f"{found['labelled tokens']:,}",
            "labelled tokens/s": f"{found['own labels/s']:.0f}",
            "fill": f"{found['fill']:.1%}",
            "peak memory": pages.gib(found["peak memory"]),
        }
        for result in results
        for name, found in result["packers"].items()
    ]
    return f"{MEANING.format(args=args)}\n\n{pages.table(rows)}"


def faster(ours: dict, other: dict) -> str:
    """How many times as fast ours was, on average and in each pair of runs."""
    if other is ours:
        return ""
    ratio = ours["labelled tokens/s"] / other["labelled tokens/s"]
    return f"{ratio:.2f}× ({', '.join(f'{one:.2f}' for one in ratios(ours, other))})"


MEANING = """\
Two trainers that pack examples as well: LLaMA-Factory 0.9.5, in an environment of its own with the
versions that it wants, and TRL 1.16. All train the same LoRA (rank 16, alpha 32, dropout 0.05, all
linear layers) on the same base, unquantized (LLaMA-Factory's 8 bits are LLM.int8, which rounds
activations, too), in the same dtype, on the same pieces of real chats, with {args.tokens:,} tokens
of capacity a step, and recompute nothing. There are {args.steps} steps a run, of which the first is
not timed, and {args.repeats} alternating runs of each. LLaMA-Factory has `packing` and
`neat_packing`, and the base stored in the compute dtype: weights stored in another one it would
cast again in every product. TRL has `packing`, and labels at the answers. Both keep examples apart
by a mask of a row's tokens × tokens; for TRL, whose documentation promises that for FlashAttention
alone, it is checked before training.

An answer token is a token of an answer, counted once. Its rate is the number of them in the corpus,
divided by the time of an epoch at the measured pace; that of tokens, without padding, likewise.
"Labelled" is what each learns in an epoch: without the marks in a split corpus, the other two learn
again what the pieces of a long answer repeat. The column after is the rate of that. Fill is the
share of the capacity that holds tokens. Memory is the peak of the whole process (of the card, if
there is one)."""
