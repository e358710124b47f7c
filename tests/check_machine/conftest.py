"""A machine whose driver tells of a card that torch does not reach."""

import os

import pytest


@pytest.fixture
def driver_with_a_p100(tmp_path, monkeypatch):
    """A machine whose NVIDIA driver tells of a P100, first on the PATH."""
    tool = tmp_path / "nvidia-smi"
    answers = {
        "name": "Tesla P100-PCIE-16GB",
        "compute_cap": "6.0",
        "memory.total": "16384 MiB",
        "driver_version": "535.183.01",
    }
    cases = " ".join(f"*={field}) echo {answer};;" for field, answer in answers.items())
    tool.write_text(f'#!/bin/sh\ncase "$1" in {cases} esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
