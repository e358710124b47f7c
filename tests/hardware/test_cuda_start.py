"""CUDA finds the setting of its memory in place when it starts, whichever script starts it."""

import os

import pytest
import torch

from llama_lora.check_machine.checks import examine
from llama_lora.model.base import load_base
from tests.conftest import ROOT, TRAIN, run_here

NAMES = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


class Started(Exception):
    """Of a card that is not there; its message is the setting that it would have read."""


@pytest.fixture
def card(monkeypatch):
    """A card that ends the run as soon as CUDA starts."""

    def start(*_):
        raise Started([os.environ.get(name) for name in NAMES])

    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("_lazy_init", "set_device"):
        monkeypatch.setattr(torch.cuda, name, start)


@pytest.fixture(params=["generate.py", "fastchat/eval/evaluate.py", TRAIN, "check_machine", "base"])
def starting(request, tiny_base, tmp_path):
    """Something that loads a base."""
    script, own = request.param, ("--base_model", tiny_base)
    data = "--data_path", ROOT / "data/dummy_en.json"
    flags = {
        "generate.py": (*own, "--prompt", "Who are you?"),
        "fastchat/eval/evaluate.py": (*own, *data, "--output_dir", tmp_path),
        TRAIN: ("--model_name_or_path", tiny_base, *data, "--output_dir", tmp_path),
    }
    if script == "base":
        return lambda: load_base(tiny_base, dtype=torch.float16)
    if script == "check_machine":
        return lambda: list(examine(ROOT / "requirements.txt", tmp_path))
    return lambda: run_here(script, *flags[script])


def test_blocks_grow_wherever_a_base_is_loaded(starting, card):
    with pytest.raises(Started, match="expandable_segments:True"):
        starting()


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_of_the_users_own_stays(starting, card, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:128")
    with pytest.raises(Started) as found:
        starting()
    assert str(found.value).count("max_split_size_mb:128") == 1
    assert "expandable_segments" not in str(found.value)
