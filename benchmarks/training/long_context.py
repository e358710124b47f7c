"""Memory and time of a training step with what makes room for long conversations, one by one.

python3 -m benchmarks.training.long_context --write

One conversation of `--tokens` goes through a Llama of random weights with LoRA matrices on all its
linear layers. Memory is what the step holds at most beside weights, beside the plan's figure.
"""

import argparse
import tempfile

from benchmarks import pages

MODES = {
    "all layers keep their activations": ("False", "False", "1"),
    "all layers recompute": ("True", "False", "1"),
    "… their MLPs in tiles": ("True", "False", None),
    "… their inputs on the host": ("True", "True", None),
}


def parse_args() -> argparse.Namespace:
    parser = pages.parser(__doc__, "long-context-memory.md")
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--hidden", type=int, default=512, help="size of the hidden states")
    parser.add_argument("--intermediate", type=int, default=1_376, help="width of the MLPs")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quantization", choices=pages.PRECISIONS, default="4bit")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--tiles", default="8", help="tiles of the MLPs")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = llama(args, device)
    modes = MODES if device == "cuda" else {k: v for k, v in MODES.items() if v[1] == "False"}
    rows = [row(args, model, name, mode) for name, mode in modes.items()]
    pages.publish(
        args,
        "Memory of long conversations",
        meaning(args),
        pages.table(rows, left=1),
        "## A layer of LLaMA-7B",
        "By the formulae, in 16 bits on a card, LoRA of rank 32 on all linear layers, per token:",
        pages.table(at_7b(), left=1),
    )


def llama(args: argparse.Namespace, device: str):
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from llama_lora.model.base import load_base
    from llama_lora.train import lora_model

    set_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        num_hidden_layers=args.layers,
        max_position_embeddings=args.tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        base = load_base(folder, args.quantization, device=device)
    model = lora_model.adapted(base, 16, 32, args.dropout, ["all-linear"])
    for parameter in model.parameters():
        if parameter.requires_grad:  # as DeepSpeed casts them
            parameter.data = parameter.data.to(base.dtype)
    return model.train()


def row(args: argparse.Namespace, model, name: str, mode: tuple) -> dict:
    from llama_lora.train.memory import gradient_checkpointing

    wanted, offload, tiles = mode
    tiles = tiles or args.tiles
    gradient_checkpointing.set_up(model.get_base_model(), wanted, args.tokens, offload, tiles)
    step(model, 64)  # what is made once
    held = measured(model, args.tokens)
    formula = foretold(args, model, wanted == "True", offload == "True", int(tiles))
    return {
        "": name.replace("in tiles", f"in {args.tiles} tiles"),
        "held at most": f"{held / 1e6:,.0f} MB",
        "a token": f"{held / args.tokens / 1e3:.1f} KB",
        "formula": f"{formula / 1e6:,.0f} MB",
    }


def step(model, tokens: int):
    import torch

    ids = torch.arange(tokens, device=model.device)[None] % 1000
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def measured(model, tokens: int) -> int:
    """Bytes held at most in a step."""
    import torch

    from llama_lora.train.memory.gradient_checkpointing import LiveBytes

    if model.device.type == "cuda":
        step(model, tokens)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, tokens)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        step(model, tokens)
    return live.peak


def foretold(args, model, recomputed: bool, offloaded: bool, tiles: int) -> float:
    from llama_lora.hardware.device import present
    from llama_lora.model.folder.shape import head_size
    from llama_lora.train.compute.attention_kernels import kernel_for
    from llama_lora.train.memory.activation_offload import ON_THE_WAY
    from llama_lora.train.plan import activation_memory

    config, size = model.get_base_model().config, model.dtype.itemsize
    on_card = model.device.type == "cuda"
    kernel = kernel_for(model.dtype, head_size(config), present().capability)
    attention = activation_memory.Attention(kernel)
    targets = ["all-linear"]
    layer = activation_memory.Layer.of(config, targets, 16, size, args.dropout, on_card, attention)
    kept = layer.kept()
    waiting = activation_memory.checkpoint_per_token(config, size) if recomputed else kept
    layers = ON_THE_WAY if offloaded else args.layers
    at_work = layer.peak(tiles) - (0 if recomputed else kept)
    beside = activation_memory.beside_layers_per_token(config, size)
    beside += args.layers * activation_memory.masks_per_token(targets, args.dropout)
    return args.tokens * (layers * waiting + at_work + beside)


def meaning(args: argparse.Namespace) -> str:
    return f"""\
{pages.origin()}.

{args.layers} layers with hidden states of {args.hidden:,}, {args.heads} heads and MLPs of
{args.intermediate:,}; `--quantization {args.quantization}`, LoRA of rank 16 on all linear layers,
dropout {args.dropout:g}.

One step on a conversation of {args.tokens:,} tokens: the most that it holds besides the
weights, and what the formulae of `llama_lora/train/plan/activation_memory.py` say."""


def at_7b() -> list[dict]:
    """What the formulae say of a layer of LLaMA-7B, by dropout."""
    from transformers import LlamaConfig

    from llama_lora.train.plan.activation_memory import Layer, checkpoint_per_token

    llama = LlamaConfig()  # LLaMA-7B's sizes by default

    def row(name: str, figure) -> dict:
        cells = {"": name}
        for dropout in (0.05, 0.0):
            size = figure(Layer.of(llama, ["all-linear"], 32, 2, dropout))
            cells[f"`--lora_dropout {dropout:g}`"] = f"{size / 1e3:,.0f} KB"
        return cells

    tiled = {1: "MLP whole", 2: "MLP in 2 tiles", 4: "MLP in 4 tiles", 8: "MLP in 8 tiles"}
    return [
        row("kept for the backward pass", Layer.kept),
        row("kept if it recomputes: its input", lambda layer: checkpoint_per_token(llama, 2)),
        *(
            row(
                f"held at most while it goes backward, {name}",
                lambda layer, n=n: layer.peak(n),
            )
            for n, name in tiled.items()
        ),
    ]


if __name__ == "__main__":
    main(parse_args())
