"""Optimizers with states in 8 bits, on a CPU as on a card."""

import json

import pytest
import torch
from torch.utils._pytree import tree_leaves

from llama_lora.train.checkpoints import is_complete
from tests.conftest import run_here, shipped


@pytest.mark.slow
def test_adamw_with_states_in_8_bits_trains_and_resumes(tiny_base, tmp_path):
    """Nothing is paged without a card."""
    corpus, output = tmp_path / "split.json", tmp_path / "output"
    corpus.write_text(json.dumps(shipped("dummy_en.json")[:16]))

    def train(steps, *more):
        return run_here(
            "fastchat/train/train_lora.py",
            *("--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", output),
            *("--model_max_length", 256, "--lora_r", 128, "--learning_rate", 2e-3),
            *("--optim", "paged_adamw_8bit", "--max_steps", steps, "--save_steps", 2),
            *("--mlp_tiles", 3, "--gradient_checkpointing", "True"),
            *more,
        )

    assert train(2).returncode == 0
    done = train(4, "--resume_from_checkpoint", "True")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert "their MLPs in tiles of" in done.stdout
    assert is_complete(output / "checkpoint-4")
    saved = torch.load(output / "checkpoint-4/optimizer.pt", weights_only=True)
    numbers = [leaf for leaf in tree_leaves(saved["state"]) if torch.is_tensor(leaf)]
    in_8_bits = sum(one.numel() for one in numbers if one.dtype == torch.uint8)
    parameters = json.loads((output / "summary.json").read_text())["trainable_parameters"]
    assert in_8_bits > 0.9 * 2 * parameters  # two states each; those of small matrices are in fp32
