"""What flags are taken to mean on this machine, and on a card."""

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
