"""Llamas of any small shape with LoRA matrices on them, and what a training step makes of them."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llama_lora.model import adapter
from llama_lora.model.base import load_base
from llama_lora.train import lora_model
from llama_lora.train.data.example import Example
from llama_lora.train.data.packing import collate


def adapted_llama(
    folder,
    quantization="none",
    dtype=torch.float32,
    targets=("all-linear",),
    r=4,
    dropout=0.0,
    use_dora=False,
    **shape,
):
    """A base saved in `folder`, loaded as training loads it, with LoRA matrices off their zero."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, pad_token_id=0, **(sizes | shape))
    LlamaForCausalLM(config).save_pretrained(folder)
    base = load_base(folder, quantization, dtype, "cpu")
    model = lora_model.adapted(base, r, 2 * r, dropout, list(targets), use_dora=use_dora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def trainable(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model, tokens: int = 50, seed: int = 1) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of one micro-batch of two examples, computed as the trainer does."""
    torch.manual_seed(seed)
    loss = model(**batch(tokens)).loss
    return loss.detach(), torch.autograd.grad(loss, trainable(model))


def batch(tokens: int) -> dict:
    """A micro-batch of two examples, learned from end to end."""
    ids = np.arange(tokens, dtype=np.int32) * 7 % 61
    made = collate([[Example("", "", part, part) for part in np.split(ids, [tokens // 3])]])
    del made["names"]
    return made


def layers_of(model) -> list:
    return list(model.get_base_model().model.layers)


def same_adapter(one: Path, other: Path) -> bool:
    """Whether two saved adapters are equal in every bit."""
    a, b = (load_file(folder / adapter.WEIGHTS) for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
