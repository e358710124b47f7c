"""CUDA finds the setting of its memory in place when it starts, whichever script starts it.

Each in a process of its own: whatever imports bitsandbytes first starts CUDA.
"""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, TRAIN

NAMES = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
CARD = """
import os, runpy, sys, torch

def start(*_):
    print("read:", *(os.environ.get(name) for name in {names}), flush=True)
    os._exit(7)

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda._lazy_init, torch.cuda.set_device = start, lambda device: start()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def read_by_cuda(script, *flags, **setting) -> str:
    """What stands in the environment when a card that is not there would be started."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    driver = CARD.format(names=NAMES)
    done = subprocess.run(
        [sys.executable, "-c", driver, *map(str, [ROOT / script, *flags])],
        capture_output=True,
        text=True,
        env=environment | setting,
    )
    assert done.returncode == 7, done.stderr
    return done.stdout.partition("read: ")[2]


@pytest.fixture(params=["generate", "adapter", "evaluate", "train", "check_machine"])
def script(request, tiny_base, random_lora, tmp_path):
    """A script that loads a base, with its flags."""
    base, data = ("--base_model", tiny_base), ("--data_path", ROOT / "data/dummy_en.json")
    return {
        "generate": ("generate.py", *base, "--prompt", "Who are you?"),
        "adapter": ("generate.py", *base, "--prompt", "Hi", "--lora_weights", random_lora),
        "evaluate": ("fastchat/eval/evaluate.py", *base, *data, "--output_dir", tmp_path),
        "train": (TRAIN, "--model_name_or_path", tiny_base, *data, "--output_dir", tmp_path),
        "check_machine": ("fastchat/train/check_machine.py", "--folder", tmp_path),
    }[request.param]


def test_blocks_grow_wherever_a_base_is_loaded(script):
    assert "expandable_segments:True" in read_by_cuda(*script)


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_of_the_users_own_stays(name, tiny_base):
    own = {name: "max_split_size_mb:128"}
    read = read_by_cuda("generate.py", "--base_model", tiny_base, "--prompt", "Hi", **own)
    assert read.split().count("max_split_size_mb:128") == 1
    assert "expandable_segments" not in read
