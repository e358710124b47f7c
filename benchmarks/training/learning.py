"""What equal time teaches: held-out loss after training with ours and with other trainers.

make .demo/base/config.json && pip install -r benchmarks/requirements.txt
python3 -m benchmarks.training.learning --write

Each contender trains with its own defaults, or what its own example or documentation sets, from the
same base in the same precision, on the same conversations. A probe of a few steps first measures
its pace, so that its learning rate's schedule ends with the time. Then each adapter is measured in
the same way on conversations that no one saw. After that, ours and the best of the others train
again, on two disjoint parts of the corpus with several seeds.

What was trained with the same flags before is not trained again, so that a run that was cut off
goes on; `--again` starts over.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from benchmarks import pages
from benchmarks import training_runs as runs
from benchmarks.training.contenders import llama_factory

PARTS = 2
TRAINING_PIECES = 6000  # of a part at most, more than two cores get through
RECIPES = {  # the script of each, and its flags
    "reference": ("reference_recipe", []),
    "trl": ("trl_recipe", []),
    "trl-docs": ("trl_recipe", ["--settings", "docs"]),
    "unsloth": ("trl_recipe", ["--settings", "unsloth"]),
}
NAMES = {
    "ours": "ours, its defaults",
    "reference": "FastChat's recipe",
    "trl": "TRL's SFTTrainer, its and peft's defaults",
    "trl-docs": "TRL's SFTTrainer, the LoRA command in its docs",
    "llama-factory": "LLaMA-Factory, its LoRA example",
    "unsloth": "unsloth's notebook, with TRL's SFTTrainer",
}


def parse_args() -> argparse.Namespace:
    parser = runs.parser(__doc__, "learning.md")
    add = parser.add_argument
    add("--quantization", choices=pages.PRECISIONS, default="none", help="precision of the base")
    add("--minutes", type=float, default=20, help="training time of each")
    add(
        "--pair-minutes",
        type=float,
        default=10,
        help="training time of each in the pairs of ours and the best other; 0: no pairs",
    )
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help="of the pairs; all: the first")
    add("--contenders", nargs="+", choices=NAMES, default=list(NAMES), help="which train")
    add("--length", type=int, default=512, help="longest piece, in tokens")
    add("--held-out", type=int, default=100, help="pieces to measure on, at most")
    add(
        "--again", action="store_true", help="also repeat trainings that were made with these flags"
    )
    add(
        "--probe-steps",
        type=int,
        default=3,
        help="steps of the probe that decides the number of steps",
    )
    args = parser.parse_args()
    if len(args.contenders) < 2 or "ours" not in args.contenders:
        args.pair_minutes = 0
    return args


def main(args: argparse.Namespace) -> None:
    parts, held_out = prepare(args)
    before = base_loss(held_out, args)
    first = [Training(name, 1, args.seeds[0], args.minutes) for name in args.contenders]
    reached = {one.name: outcome(one, parts, held_out, args) for one in first}
    page = [
        f"{pages.origin()}, one run after the other.",
        EXPLANATION.format(args=args, held_out=len(held_out)),
        pages.table([row(name, before, found) for name, found in reached.items()]),
    ]
    if args.pair_minutes:
        best = min((name for name in reached if name != "ours"), key=lambda one: reached[one].loss)
        pace = {name: reached[name].run for name in ("ours", best)}
        pairs = compare(best, pace, parts, held_out, args)
        page += [PAIRS.format(args=args, best=NAMES[best]), pages.table(pair_rows(best, pairs))]
    pages.publish(args, "Learning in equal time", *page)


def prepare(args: argparse.Namespace) -> tuple[list[Path], list[dict]]:
    """Disjoint parts of the corpus to train on, and the pieces of others to measure on."""
    args.cache.mkdir(parents=True, exist_ok=True)
    seen, unseen = runs.real_corpus(args.cache)
    conversations = json.loads(seen.read_text())
    parts = []
    for number in range(1, PARTS + 1):
        part = seen.with_suffix(f".part{number}.json")
        runs.write(conversations[number - 1 :: PARTS], part)
        pieces = runs.pieces(part, args.base, args.length, args.cache)
        path = args.cache / f"learning-{args.length}-part{number}.json"
        parts.append(runs.write(runs.draw(pieces, TRAINING_PIECES), path))
        fill_token_cache(path, args)
    pieces = runs.pieces(unseen, args.base, args.length, args.cache)
    return parts, runs.draw(pieces, args.held_out)


def fill_token_cache(path: Path, args: argparse.Namespace) -> None:
    """Tokenize for ours beforehand, so that its probe and its run start in the same time."""
    from llama_lora.model.template import Template, load_tokenizer
    from llama_lora.train.data.examples import load_examples

    load_examples(str(path), Template(load_tokenizer(args.base)), args.length)


# ---- Trainings: for so many steps, and not longer than so many minutes ----


@dataclass(frozen=True)
class Training:
    """Who trains, on which part of the corpus (from 1), with which seed, for how long."""

    name: str
    part: int
    seed: int
    minutes: float

    def folder(self, args: argparse.Namespace) -> Path:
        """Where it is kept, by all that it depends on but the base."""
        from llama_lora.hardware.device import compute_dtype, dtype_name

        told = [
            *(self.name, f"part{self.part}", f"seed{self.seed}", f"{self.minutes:g}min"),
            *(args.length, args.quantization, dtype_name(compute_dtype())),
        ]
        return args.cache / "learning" / "-".join(map(str, told))

    def run(self, data: Path, args: argparse.Namespace, steps: int, *flags) -> runs.Run:
        out = self.folder(args)
        flags = ["--quantization", args.quantization, "--seed", self.seed, *flags]
        if self.name == "ours":
            flags += ["--model_max_length", args.length, "--max_steps", steps]
            return runs.ours(args.base, data, out, *flags)
        flags += ["--steps", steps]
        if self.name == "llama-factory":
            return llama_factory.train(args.base, data, out, args.cache, *flags)
        if self.name == "reference":
            flags += ["--max-length", args.length]
        script, settings = RECIPES[self.name]
        return runs.recipe(script, args.base, data, out, *settings, *flags)


@dataclass
class Outcome:
    """A training, and the held-out loss that it ended with."""

    run: runs.Run
    loss: float


def outcome(
    training: Training,
    parts: list[Path],
    held_out: list[dict],
    args: argparse.Namespace,
    pace: runs.Run | None = None,
) -> Outcome:
    """What comes of a training, of an earlier run of this benchmark or anew."""
    data, out = parts[training.part - 1], training.folder(args)
    run = trained(training, data, args, pace)
    return Outcome(run, kept_loss(out, lambda: adapted(args, out), held_out, args))


def trained(
    training: Training, data: Path, args: argparse.Namespace, pace: runs.Run | None
) -> runs.Run:
    record = training.folder(args) / "benchmark.json"
    if record.exists() and not args.again:
        kept = json.loads(record.read_text())
        if kept.pop("base") == str(args.base):
            print(f"{record.parent.name}: trained before", file=sys.stderr)
            return runs.Run(**kept)
    run = train(training, data, args, pace)
    record.write_text(json.dumps({"base": str(args.base), **vars(run)}))  # last: all is there
    return run


def train(
    training: Training, data: Path, args: argparse.Namespace, pace: runs.Run | None
) -> runs.Run:
    """Train for the time, with a schedule that ends with it, at the pace of an earlier run."""
    if pace is None or len(pace.entries) < 2:  # the first step is not as long as the others
        pace = training.run(data, args, args.probe_steps + 1)
    steps = steps_within(60 * training.minutes, pace)
    print(
        f"{training.folder(args).name}: {pace.seconds_per_step:.1f} s a step, {steps} steps",
        file=sys.stderr,
    )
    return training.run(data, args, steps, *limit(training, pace))


def steps_within(seconds: float, pace: runs.Run) -> int:
    later = (seconds - pace.entries[0]["seconds"]) / pace.seconds_per_step
    return max(1, 1 + round(later))


def limit(training: Training, pace: runs.Run) -> list:
    """The flag that ends a training which turns out slower than expected."""
    if training.name != "ours":
        return ["--max-minutes", training.minutes]
    # Ours counts from the start of the process, as a session's limit does.
    outside = pace.seconds - pace.entries[-1]["seconds"]
    return ["--max_hours", (60 * training.minutes + outside) / 3600]


def compare(
    best: str,
    pace: dict[str, runs.Run],
    parts: list[Path],
    held_out: list[dict],
    args: argparse.Namespace,
) -> dict[tuple[int, int], dict[str, Outcome]]:
    """Ours and the best other on each part with each seed, taking turns at being first."""
    pairs = {}
    for part in range(1, PARTS + 1):
        for seed in args.seeds:
            names = ["ours", best] if len(pairs) % 2 else [best, "ours"]
            pairs[part, seed] = {
                name: outcome(
                    Training(name, part, seed, args.pair_minutes),
                    *(parts, held_out, args, pace[name]),
                )
                for name in names
            }
    return pairs


# ---- The measure ----


def base_loss(held_out: list[dict], args: argparse.Namespace) -> float:
    folder = args.cache / "learning" / f"base-{args.length}"
    folder.mkdir(parents=True, exist_ok=True)
    return kept_loss(folder, lambda: load(args), held_out, args)


def kept_loss(folder: Path, model: Callable, held_out: list[dict], args: argparse.Namespace):
    """The held-out loss of a model, measured once after it was trained."""
    record = folder / "held_out.json"
    told = {"base": str(args.base), "pieces": len(held_out)}
    if record.exists():
        kept = json.loads(record.read_text())
        if kept.items() >= told.items():
            return kept["loss"]
    loss = held_out_loss(model(), held_out, args)
    record.write_text(json.dumps(told | {"loss": loss}))
    return loss


def load(args: argparse.Namespace):
    """The base in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        args.base, dtype="float32", local_files_only=True, trust_remote_code=False
    )


def adapted(args: argparse.Namespace, out: Path):
    """The base in fp32 with the adapter that a training ended with."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(args), reached(out))


def reached(out: Path) -> Path:
    """Where the adapter is: a run that its time limit ended left it in its last checkpoint."""
    if (out / "adapter_model.safetensors").exists():
        return out
    return max(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))


def held_out_loss(model, held_out: list[dict], args: argparse.Namespace) -> float:
    """Loss per labelled token, each piece by itself, unpacked, in fp32."""
    import torch

    from llama_lora.model.template import Template, load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for piece in Template(load_tokenizer(args.base)).encode_batch(held_out):
            logits = model(torch.tensor([piece.ids], device=device)).logits[0, :-1]
            labels = torch.tensor(piece.labels[1:], device=device)
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels >= 0).sum())
    return total / count


# ---- The page ----


def row(name: str, before: float, found: Outcome) -> dict:
    last = found.run.entries[-1]
    return {
        "contender": NAMES[name],
        "minutes": f"{last['seconds'] / 60:.2f}",
        "steps": last["step"],
        "labelled tokens seen": f"{last['labelled_tokens']:,}",
        "held-out loss before": f"{before:.4f}",
        "after": f"{found.loss:.4f}",
        "peak memory": pages.gib(found.run.peak_memory),
    }


def pair_rows(best: str, pairs: dict[tuple[int, int], dict[str, Outcome]]) -> list[dict]:
    """A row for each part and seed, and their mean."""
    losses = [(found["ours"].loss, found[best].loss) for found in pairs.values()]
    losses.append(tuple(map(mean, zip(*losses, strict=True))))
    named = [*pairs, ("mean", "")]
    return [
        {
            "part": part,
            "seed": seed,
            "ours": f"{ours:.4f}",
            NAMES[best]: f"{other:.4f}",
            "ours is lower by": f"{other - ours:.4f}",
        }
        for (part, seed), (ours, other) in zip(named, losses, strict=True)
    ]


EXPLANATION = """\
{args.minutes:g} minutes of training each, from the same base (`--quantization
{args.quantization}`), on the same pieces of English ShareGPT chats of at most {args.length} tokens,
with the same seed. Loading the model and tokenizing do not count. Each contender's own pace in a
probe decides its number of steps, so that its learning rate schedule ends when the time is over.
The held-out loss is per answer token, over {held_out} pieces of conversations that no contender
trained on, each by itself, computed in the same way for all: the base in fp32 with the adapter
through peft, the plain loss. All use the Vicuna prompt, and none recomputes activations, which some
do by default: that takes time, and memory is not scarce here.

FastChat's recipe has the flags of its README (14 conversations a step, padded). TRL learns all
tokens of a conversation by default, so its labelled tokens include the questions; with "the LoRA
command in its docs" it packs, with rank 32 and learning rate 2e-4. LLaMA-Factory 0.9.5 has its
example of LoRA (`examples/train_lora`): rank 8, learning rate 1e-4, 8 conversations a step. unsloth
needs a card, so the settings of its notebook for Llama 3.2 are TRL's here: rank 16, learning rate
2e-4, 8 conversations a step, 8-bit AdamW, answers only; its base of 4 bits is left out."""

PAIRS = """\
## Ours and the best of the others again

{args.pair_minutes:g} minutes of training each, on two disjoint parts of the corpus (of which the
first is the one above), with several seeds; {best} had the lowest held-out loss of the others. The
pace that decides the number of steps is that of the training above."""


if __name__ == "__main__":
    main(parse_args())
