"""What equal time teaches: held-out loss after training with ours, FastChat's recipe and TRL.

make .demo/base/config.json && pip install -r benchmarks/requirements.txt
python3 -m benchmarks.training.learning --write

Each contender trains with its own defaults, from the same base in the same precision, on the same
conversations. A probe of a few steps first measures its pace, so that its learning rate's schedule
ends with the time. Then each adapter is measured in the same way on conversations that no one saw.
What was trained with the same flags before is not trained again, so that a run that was cut off
goes on; `--again` starts over.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import pages
from benchmarks import training_runs as runs

TRAINING_PIECES = 6000  # more than two cores get through


def parse_args() -> argparse.Namespace:
    parser = runs.parser(__doc__, "learning.md")
    add = parser.add_argument
    add("--quantization", choices=pages.PRECISIONS, default="8bit", help="precision of the base")
    add("--minutes", type=float, default=20, help="training time of each")
    add(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=DEFAULTS,
        help="which contenders train",
    )
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
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    data, held_out = prepare(args)
    trainings = {name: trained(name, data, args) for name in args.contenders}
    before, after = measure(held_out, trainings, args)
    results = [row(name, trainings[name], before, after[name]) for name in trainings]
    pages.publish(
        args,
        "Learning in equal time",
        f"{pages.origin()}, one run after the other.",
        EXPLANATION.format(args=args, held_out=len(held_out)),
        pages.table(results),
    )


def prepare(args: argparse.Namespace) -> tuple[Path, list[dict]]:
    """The corpus to train on, and the pieces of other conversations to measure on."""
    args.cache.mkdir(parents=True, exist_ok=True)
    corpora = runs.real_corpus(args.cache)
    seen, unseen = (runs.pieces(corpus, args.base, args.length, args.cache) for corpus in corpora)
    path = args.cache / f"learning-{args.length}.json"
    runs.write(runs.draw(seen, TRAINING_PIECES), path)
    fill_token_cache(path, args)
    return path, runs.draw(unseen, args.held_out)


def fill_token_cache(path: Path, args: argparse.Namespace) -> None:
    """Tokenize for ours beforehand, so that its probe and its run start in the same time."""
    from llama_lora.model.template import Template, load_tokenizer
    from llama_lora.train.data.examples import load_examples

    load_examples(str(path), Template(load_tokenizer(args.base)), args.length)


# ---- The contenders: each trains for so many steps, and not longer than so many seconds ----


def ours(data: Path, out: Path, args: argparse.Namespace, steps: int, flags: list) -> runs.Run:
    return runs.ours(
        args.base,
        data,
        out,
        *("--model_max_length", args.length, "--quantization", args.quantization),
        *("--max_steps", steps),
        *flags,
    )


def reference(data: Path, out: Path, args: argparse.Namespace, steps: int, flags: list) -> runs.Run:
    return recipe("reference_recipe", data, out, args, steps, "--max-length", args.length, *flags)


def trl(data: Path, out: Path, args: argparse.Namespace, steps: int, flags: list) -> runs.Run:
    return recipe("trl_recipe", data, out, args, steps, *flags)


def trl_docs(data: Path, out: Path, args: argparse.Namespace, steps: int, flags: list) -> runs.Run:
    return recipe("trl_recipe", data, out, args, steps, "--as-in-docs", *flags)


def recipe(script: str, data: Path, out: Path, args: argparse.Namespace, steps: int, *flags):
    return runs.train(
        out,
        *runs.module(script),
        *("--base", args.base, "--data", data, "--out", out, "--steps", steps),
        *("--quantization", args.quantization),
        *flags,
    )


CONTENDERS = {"ours": ours, "reference": reference, "trl": trl, "trl-docs": trl_docs}
DEFAULTS = ["ours", "reference", "trl"]
NAMES = {
    "ours": "ours, its defaults",
    "reference": "FastChat's recipe",
    "trl": "TRL's SFTTrainer, its and peft's defaults",
    "trl-docs": "TRL's SFTTrainer, the LoRA command in its docs",
}


def trained(name: str, data: Path, args: argparse.Namespace) -> runs.Run:
    """A contender's training, of an earlier run of this benchmark with the same flags or anew."""
    record = args.cache / f"learning-{name}" / "benchmark.json"
    told = "minutes", "length", "quantization", "base"
    flags = {key: str(getattr(args, key)) for key in told}
    if record.exists() and not args.again:
        kept = json.loads(record.read_text())
        if kept["flags"] == flags:
            print(f"{name}: trained before", file=sys.stderr)
            return runs.Run(kept["entries"], kept["output"], kept["seconds"])
    training = train(name, data, args)
    record.write_text(json.dumps({"flags": flags, **vars(training)}))  # last: all is there
    return training


def train(name: str, data: Path, args: argparse.Namespace) -> runs.Run:
    """Train one contender for the time, with a schedule that ends with it."""
    contender, out = CONTENDERS[name], args.cache / f"learning-{name}"
    probe = contender(data, out, args, args.probe_steps + 1, [])
    seconds = 60 * args.minutes
    later = (seconds - probe.entries[0]["seconds"]) / probe.seconds_per_step
    steps = max(1, 1 + round(later))
    print(f"{name}: {probe.seconds_per_step:.1f} s a step, {steps} steps", file=sys.stderr)
    return contender(data, out, args, steps, limit(name, seconds, probe))


def limit(name: str, seconds: float, probe: runs.Run) -> list:
    """The flag that ends a training which turns out slower than its probe."""
    if name != "ours":
        return ["--max-minutes", seconds / 60]
    # Ours counts from the start of the process, as a session's limit does.
    outside = probe.seconds - probe.entries[-1]["seconds"]
    return ["--max_hours", (seconds + outside) / 3600]


# ---- The measure ----


def measure(
    held_out: list[dict], trainings: dict[str, runs.Run], args: argparse.Namespace
) -> tuple[float, dict[str, float]]:
    """Held-out loss of the base alone and with each contender's adapter."""
    from transformers import AutoModelForCausalLM

    from llama_lora.model.template import Template, load_tokenizer

    encoded = Template(load_tokenizer(args.base)).encode_batch(held_out)
    base = AutoModelForCausalLM.from_pretrained(
        args.base, dtype="float32", local_files_only=True, trust_remote_code=False
    )
    before = held_out_loss(base, encoded)
    after = {
        name: held_out_loss(adapted(args, args.cache / f"learning-{name}"), encoded)
        for name in trainings
    }
    return before, after


def adapted(args: argparse.Namespace, out: Path):
    """The base in fp32 with the adapter that a training ended with."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        args.base, dtype="float32", local_files_only=True, trust_remote_code=False
    )
    return PeftModel.from_pretrained(base, reached(out))


def reached(out: Path) -> Path:
    """Where the adapter is: a run that its time limit ended left it in its last checkpoint."""
    if (out / "adapter_model.safetensors").exists():
        return out
    return max(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))


def held_out_loss(model, encoded) -> float:
    """Loss per labelled token, each piece by itself, unpacked, in fp32."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for piece in encoded:
            logits = model(torch.tensor([piece.ids], device=device)).logits[0, :-1]
            labels = torch.tensor(piece.labels[1:], device=device)
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels >= 0).sum())
    return total / count


def row(name: str, training: runs.Run, before: float, after: float) -> dict:
    last = training.entries[-1]
    return {
        "contender": NAMES[name],
        "minutes": f"{last['seconds'] / 60:.2f}",
        "steps": last["step"],
        "labelled tokens seen": f"{last['labelled_tokens']:,}",
        "held-out loss before": f"{before:.4f}",
        "after": f"{after:.4f}",
        "peak memory": pages.gib(training.peak_memory),
    }


EXPLANATION = """\
{args.minutes:g} minutes of training each, from the same base (`--quantization
{args.quantization}`), on the same pieces of English ShareGPT chats of at most {args.length} tokens.
Loading the model and tokenizing do not count. Each contender's own pace in a probe decides its
number of steps, so that its learning rate schedule ends when the time is over. The held-out loss is
per answer token, over {held_out} pieces of conversations that no contender trained on, each by
itself, computed in the same way for all: the base in fp32 with the adapter through peft, the plain
loss. All use the Vicuna prompt. FastChat's recipe has the flags of its README (14 conversations a
step, padded). TRL learns all tokens of a conversation by default, so its labelled tokens include
the questions; with "the LoRA command in its docs" it packs, with rank 32 and learning rate 2e-4."""


if __name__ == "__main__":
    main(parse_args())
