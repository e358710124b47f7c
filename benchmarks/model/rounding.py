"""How far a base in 8 or 4 bits and an optimizer in 8 bits are from fp32, on a real model.

make demo && python3 -m benchmarks.model.rounding --write

check_machine.py tries one layer of random weights, to see that kernels run and run right. Here are
all layers of a real base, on the inputs that real chats give them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import pages
from benchmarks import training_runs as runs
from benchmarks.pages import ROOT
from llama_lora.check_machine.screen import HEADING

CHECK = ROOT / "fastchat/train/check_machine.py"
RANK = 16


def parse_args() -> argparse.Namespace:
    return parser(__doc__, "cards.md", pieces=16, length=512).parse_args()


def parser(doc: str, page: str, pieces: int, length: int) -> argparse.ArgumentParser:
    """A parser with what `read` needs, by default so many pieces of so many tokens."""
    told = pages.parser(doc, page)
    add = told.add_argument
    add("--base", type=Path, default=ROOT / ".demo/base", help="base model folder")
    add("--data", type=Path, default=ROOT / ".demo/split.json", help="corpus file, split")
    add("--pieces", type=int, default=pieces, help="how many of its pieces")
    add("--length", type=int, default=length, help="longest piece, in tokens")
    return told


def main(args: argparse.Namespace) -> None:
    checked = checks()
    batches = read(args)
    exact = loaded(args.base, "none")
    outputs = {name: layer_errors(exact, args.base, name, batches) for name in ("8bit", "4bit")}
    loss, gradients = learn(exact, batches)
    rows = [row("none, in float32", loss, [], 0)]
    for name, errors in outputs.items():
        loss, found = learn(loaded(args.base, name), batches)
        rows.append(row(name, loss, errors, relative(flat(found), flat(gradients))))
    pages.publish_part(
        args,
        f"{pages.origin()}. There check_machine.py prints, among other lines:",
        f"```\n{checked}\n```",
        MEANING.format(pieces=len(batches), tokens=sum(ids.numel() for ids, _ in batches)),
        pages.table(rows, left=1),
        f"With fp32's gradients, {len(batches)} steps of AdamW with 8-bit states move the B "
        f"matrices {moved_apart(gradients):.2%} away from where fp32 states move them (the "
        "smallest ones have fp32 states anyway).",
    )


MEANING = """\
That is for a layer of random weights. The table is for the demo's base (SmolLM2-135M, from a GGUF
file that holds it in 4 bits of another kind), on {pieces} of the demo's chats, {tokens:,} tokens:
how far a linear layer's output is from fp32's on the same input; how far the gradients of all B
matrices together are before the first step (those of A are zero then), where the layers' errors add
up; and the loss per answer token. A 7B was not measured here."""


def checks() -> str:
    """The lines of check_machine.py that tell an error, and its verdict."""
    done = subprocess.run([sys.executable, CHECK], capture_output=True, text=True)
    told = done.stdout.partition(HEADING)[0].splitlines()
    lines = [line for line in told if " from fp32" in line]
    verdict = [line for line in told if line.startswith("Training can")]
    return "\n".join([*lines, "", *verdict])


def read(args: argparse.Namespace) -> list[tuple]:
    """Ids and labels of a few pieces: int64 [1, tokens]."""
    import torch

    from llama_lora.model.template import Template, load_tokenizer

    items = runs.draw(json.loads(args.data.read_text()), args.pieces)
    encoded = Template(load_tokenizer(args.base)).encode_batch(items)
    parts = [(one.ids[: args.length], one.labels[: args.length]) for one in encoded]
    return [tuple(torch.tensor([part], device=device()) for part in pair) for pair in parts]


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def loaded(base: Path, quantization: str):
    """The base; in fp32 where it is not quantized, else as it is trained here."""
    import torch

    from llama_lora.hardware.device import compute_dtype
    from llama_lora.model.base import load_base

    dtype = torch.float32 if quantization == "none" else compute_dtype()
    return load_base(base, quantization, dtype, device()).requires_grad_(False)


def layer_errors(exact, base: Path, quantization: str, batches: list[tuple]) -> list[float]:
    """For each linear layer and batch, how far its output is from fp32's on the same input."""
    import torch

    twin, errors, hooks = loaded(base, quantization), [], []

    def compare(rounded):
        def hook(module, inputs, output):
            found = rounded(inputs[0].to(twin.dtype)).float()
            errors.append(relative([found], [output]))

        return hook

    for name, module in exact.base_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            rounded = twin.base_model.get_submodule(name)
            hooks.append(module.register_forward_hook(compare(rounded)))
    with torch.no_grad():
        for ids, _ in batches:
            exact(ids)
    for hook in hooks:
        hook.remove()
    return errors


def learn(model, batches: list[tuple]) -> tuple[float, list[list]]:
    """Loss per answer token, and for each batch the gradients of LoRA's matrices, in fp32."""
    import torch

    from llama_lora.model import adapter
    from llama_lora.model.labels import IGNORE

    torch.manual_seed(0)  # the same matrices in every base
    model = adapter.attach(model, RANK, 2 * RANK, 0.0, ["all-linear"])
    matrices = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, count, gradients = 0.0, 0, []
    mixed = model.dtype != torch.float32
    for ids, labels in batches:
        with torch.autocast(device(), model.dtype if mixed else None, enabled=mixed):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        gradients.append([one.float() for one in torch.autograd.grad(loss, matrices)])
        labelled = int((labels[:, 1:] != IGNORE).sum())
        total, count = total + labelled * loss.item(), count + labelled
    return total / count, gradients


def moved_apart(gradients: list[list]) -> float:
    """How far steps of AdamW with states of 8 bits lead from those of fp32."""
    import torch
    from bitsandbytes.optim import AdamW8bit

    def moved(kind) -> list:
        matrices = [torch.nn.Parameter(torch.zeros_like(one)) for one in gradients[0]]
        optimizer = kind(matrices, lr=1e-4)
        for batch in gradients:
            for matrix, gradient in zip(matrices, batch, strict=True):
                matrix.grad = gradient.clone()
            optimizer.step()
        return [matrix.detach() for matrix in matrices]

    return relative(moved(AdamW8bit), moved(torch.optim.AdamW))


def relative(found: list, expected: list) -> float:
    """The norm of the difference, as a share of the norm of what is expected."""
    apart = sum((a - b).square().sum() for a, b in zip(found, expected, strict=True))
    return (apart / sum(b.square().sum() for b in expected)).sqrt().item()


def flat(batches: list[list]) -> list:
    return [gradient for batch in batches for gradient in batch]


def row(name: str, loss: float, errors: list[float], gradient: float) -> dict:
    exact = not errors
    return {
        "base": name,
        "output of a layer, mean": "–" if exact else f"{sum(errors) / len(errors):.2%}",
        "largest": "–" if exact else f"{max(errors):.2%}",
        "gradients": "–" if exact else f"{gradient:.2%}",
        "loss": f"{loss:.4f}",
    }


if __name__ == "__main__":
    main(parse_args())
