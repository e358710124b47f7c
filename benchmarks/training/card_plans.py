"""What the memory plan says of a 7B Llama on the known cards: memory and hours for real chats.

make .demo/base/config.json && python3 -m benchmarks.training.card_plans --write

Nothing is trained, and no card is needed: it is what `--dry_run True --plan_for CARD`
prints. Lengths are those of real English chats, counted with the demo base's tokenizer.
"""

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace

from benchmarks import pages
from benchmarks import training_runs as runs

CARDS = ["T4", "2xT4", "P100", "V100", "RTX A4000", "RTX 4080", "RTX 5060 Ti", "RTX 3090", "A100"]
LENGTHS = [512, 2048]


def parse_args() -> argparse.Namespace:
    return runs.parser(__doc__, "card-plans.md").parse_args()


def main(args: argparse.Namespace) -> None:
    from transformers import LlamaConfig

    from llama_lora.model.folder.shape import shape_of

    args.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)  # 7B by default
        shape = shape_of(Path(folder))
    chats, _ = runs.real_corpus(args.cache)
    rows = []
    for length in LENGTHS:
        examples = load(chats, length, args)
        rows += [row(shape, examples, length, card) for card in CARDS]
    explanation = EXPLANATION.format(
        parameters=shape.parameters / 1e9,
        chats=len(set(examples.sources)),
        length=length,
        tokens=int(examples.lengths.sum()),
        labelled=examples.labelled(),
    )
    pages.publish(
        args, "Plans for a 7B Llama", f"{pages.origin()}.", explanation, pages.table(rows)
    )


def load(chats: Path, length: int, args: argparse.Namespace):
    """Real chats as examples of at most `length` tokens."""
    from llama_lora.model.template import Template, load_tokenizer
    from llama_lora.train.data.examples import load_examples

    pieces = runs.pieces(chats, args.base, length, args.cache)
    path = runs.write(pieces, args.cache / f"plans-{length}.json")
    return load_examples(str(path), Template(load_tokenizer(args.base)), length)[0]


def row(shape, examples, length: int, card: str) -> dict:
    """What training with the default flags takes on a card, its batch computed as it fits."""
    from llama_lora.hardware.device import resolve_quantization
    from llama_lora.train.arguments import LoraArguments
    from llama_lora.train.data.packing import MicroBatches
    from llama_lora.train.plan import forecast

    found, _ = forecast.cards_named(card)
    quantization, _ = resolve_quantization("auto", found)
    flags = SimpleNamespace(
        plan_for=card,
        optim="adamw_torch",
        recompute="auto",
        offload_activations="auto",
        mlp_tiles="auto",
        in_parts=True,
        gradient_accumulation_steps=1,
        max_steps=-1,
        num_train_epochs=1,
    )
    told = forecast.of(
        shape, quantization, LoraArguments(), flags, MicroBatches(examples, length, 4)
    )
    setup = told.plan.setup
    return {
        "card": card,
        "length": length,
        "base": quantization,
        "memory": pages.gib(told.plan.total),
        "available": pages.gib(told.plan.available),
        "fits": "yes" if told.plan.fits else "no",
        "computed at once": f"{setup.part_tokens:,} tokens",
        "recompute": f"{told.plan.recomputed} of {shape.layers} layers",
        "hours an epoch": f"{told.hours:.1f}",
    }


EXPLANATION = """\
Estimated, not measured: {parameters:.2f} B parameters, LoRA with the default flags (all linear
layers, rank 16), micro-batches of 4 × the length, computed in parts that fit
(`--per_device_train_batch_size auto`), layers recomputed if memory requires it. Hours are for an
epoch of {chats:,} real English chats ({tokens:,} tokens at a length of {length:,}; {labelled:,} of
them are labelled), at the assumed share of each card's published peak; two epochs take twice as
long. `--dry_run True` says the same about your corpus; on the card itself it measures the rate."""


if __name__ == "__main__":
    main(parse_args())
