"""What the tests of the evaluation share: an adapter, the script, and plain losses."""

import functools
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from llama_lora.chat.adapters import BASE
from llama_lora.model import adapter
from llama_lora.model.template import Template, load_tokenizer
from tests.conftest import run_here

SIDES = [BASE, "adapter"]
evaluate = functools.partial(run_here, "fastchat/eval/evaluate.py")


def adapted(base: Path, folder: Path) -> Path:
    """An adapter on `base` that changes what it says, in `folder`."""
    torch.manual_seed(1)
    model = adapter.attach(AutoModelForCausalLM.from_pretrained(base), 4, 8, 0.0, ["all-linear"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    adapter.save(model, Template(load_tokenizer(base)), folder)
    return folder


def plain_losses(model, examples) -> list[float]:
    """Summed cross-entropy of each example, by itself, from the logits of the model."""
    found = []
    with torch.no_grad():
        for i in range(len(examples)):
            ids, labels = (
                torch.tensor(part.astype(np.int64))
                for part in (examples[i].ids, examples[i].labels)
            )
            logits = model(ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            found.append(loss.item())
    return found
