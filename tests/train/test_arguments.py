"""What flags are taken to mean on this machine, and on a card."""

import os

import pytest
import torch

from llama_lora.train import arguments


def test_deepspeed_trains_in_fp16_on_a_p100(monkeypatch, tmp_path):
    """It refuses compute capability 6 unless it is told that this is meant."""
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    monkeypatch.delenv("DS_ALLOW_DEPRECATED_FP16", raising=False)
    arguments.TrainingArguments(output_dir=str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 0))
    assert CUDA_Accelerator().is_fp16_supported()


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_cards_blocks_grow_unless_the_user_has_said_otherwise(monkeypatch, tmp_path, own):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:128")
    arguments.TrainingArguments(output_dir=str(tmp_path))
    grow = os.environ.get("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    assert grow == (own is None)
