"""Optimizers with states in 8 bits, on a CPU as on a card."""

import json

import torch
from conftest import shipped

from llama_lora.train.checkpoints import is_complete


def test_adamw_with_states_in_8_bits_trains_and_resumes(train_here, tiny_base, tmp_path):
    """Nothing is paged without a card."""
    corpus, output = tmp_path / "split.json", tmp_path / "output"
    corpus.write_text(json.dumps(shipped("dummy_en.json")[:16]))

    def train(steps):
        return train_here(
            *("--model_name_or_path", tiny_base, "--data_path", corpus, "--output_dir", output),
            *("--model_max_length", 256, "--lora_r", 128, "--learning_rate", 2e-3),
            *("--optim", "paged_adamw_8bit", "--max_steps", steps, "--save_steps", 2),
            *("--mlp_tiles", 3, "--gradient_checkpointing", "True"),
        )

    assert train(2).returncode == 0
    done = train(4)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert "in tiles of 342 tokens" in done.stdout  # a third of four times 256
    assert is_complete(output / "checkpoint-4")
    states = torch.load(output / "checkpoint-4/optimizer.pt", weights_only=True)["state"].values()
    large = [state for state in states if state["state1"].numel() >= 4096]
    assert large
    assert all(state["state1"].dtype == torch.uint8 for state in large)
    assert all(state["step"] == 4 for state in large)
