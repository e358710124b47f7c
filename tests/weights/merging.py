"""What the tests of merging share: bases and adapters with random weights, and the script."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llama_lora.model import adapter
from llama_lora.model.folder.config import load_config
from llama_lora.model.template import Template, load_tokenizer
from tests.conftest import ROOT, error_line, run_here

SCRIPT = ROOT / "fastchat/model/merge_lora.py"
TARGETS = ["q_proj", "v_proj", "down_proj"]


def make_base(folder: Path, tokenizer, dtype=torch.float32, **changes) -> Path:
    """A random Llama with grouped queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, **settings) -> Path:
    """An adapter with random matrices, saved as training saves one."""
    model = AutoModelForCausalLM.from_pretrained(base, config=load_config(base))
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    )
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            elif "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    adapter.save(model, Template(load_tokenizer(base)), folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 200)[None]).logits[0]


def loaded(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def command(base, lora, target, *flags):
    """Run the script in this process."""
    own = ["--base_model", base, "--lora_weights", lora, "--output_dir", target]
    return run_here(SCRIPT, *own, *flags)


def refused(*words) -> str:
    """The one line of a merge that was refused."""
    return error_line(command(*words))
