"""The model to train: a frozen base with fresh LoRA matrices."""

from transformers import set_seed

from llama_lora.model import adapter
from llama_lora.model.base import load_base
from llama_lora.train.arguments import fitting_learning_rate
from llama_lora.train.compute import (
    chunked_loss,
    gated_mlp,
    lora_layers,
    packed_attention,
    rms_norm,
    rotary_embedding,
)


def load(folder: str, quantization: str, lora, args):
    """A base with LoRA matrices on it, with its loss in chunks and attention within examples.

    Args:
        quantization: "8bit", "4bit" or "none".
        lora: `LoraArguments`; `args` the `TrainingArguments`. If its learning rate is None, it is
            set to one that fits the base's size.

    Returns:
        A peft model.
    """
    base = load_base(folder, quantization, args.compute_dtype, args.device)
    if args.learning_rate is None:
        args.learning_rate = fitting_learning_rate(base.config.hidden_size)
    set_seed(args.seed)  # the A matrices start at random
    matrices = lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_target_modules
    kinds = {"use_dora": lora.use_dora, "use_rslora": lora.use_rslora}
    return adapted(base, *matrices, seed=args.seed, **kinds)


def adapted(base, r: int, alpha: int, dropout: float, targets: list[str], seed: int = 0, **kinds):
    """The peft model of `adapter.attach` on a base, as it computes in training.

    Args:
        seed: of the dropout before LoRA matrices.
    """
    base.config.use_cache = False
    base.set_attn_implementation(packed_attention.BY_EXAMPLE)
    chunked_loss.compute_in_chunks(base)
    model = adapter.attach(base, r, alpha, dropout, targets, **kinds)
    lora_layers.set_up(model, seed)
    for part in (gated_mlp, rms_norm, rotary_embedding):
        part.set_up(model)
    return model
