"""Bases of other architectures than Llama, small and random, with windows and without."""

from pathlib import Path

import torch
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3NextConfig,
    StableLmConfig,
)

WINDOW = 16
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # so that what is attended to matters
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"]


def config(kind: str, **more):
    """Of a base with a window of `WINDOW` tokens, where its architecture has them."""
    made, own = {
        "llama": (LlamaConfig, {}),
        "mistral": (MistralConfig, {"sliding_window": WINDOW}),
        "phi3": (Phi3Config, {"sliding_window": WINDOW}),
        "gemma3": (
            Gemma3TextConfig,
            {"sliding_window": WINDOW, "layer_types": ALTERNATING, "head_dim": 8},
        ),
        "qwen2": (
            Qwen2Config,
            {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        ),
        "gemma2": (Gemma2Config, {"sliding_window": WINDOW, "head_dim": 8}),
        "gpt_oss": (GptOssConfig, {"sliding_window": WINDOW, "head_dim": 8}),
        "llama4_text": (Llama4TextConfig, {"attention_chunk_size": WINDOW, "head_dim": 8}),
        "qwen3_next": (Qwen3NextConfig, {}),
        "olmo2": (Olmo2Config, {}),
        "stablelm": (StableLmConfig, {}),
        "nemotron": (NemotronConfig, {}),
        "afmoe": (AfmoeConfig, {"sliding_window": WINDOW, "head_dim": 8, "num_experts": 8}),
    }[kind]
    return made(**(SIZES | own | more))


def model(kind: str, implementation: str, **more):
    """In fp32; the same weights whatever the implementation."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config(kind, **more), attn_implementation=implementation
    ).eval()


def saved(folder: Path, kind: str, tokenizer, weights: bool = True, **more) -> Path:
    """A model folder with that tokenizer, with `weights` or the config alone."""
    more |= {"vocab_size": len(tokenizer)}
    (model(kind, "eager", **more) if weights else config(kind, **more)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
