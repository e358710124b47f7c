"""The README's stages in order, each through its script, from the shipped data to an answer."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TRAIN, deepspeed, run_here
from tests.documents import blocks, commands


@pytest.mark.parametrize("launcher", ["python", "deepspeed"])
def test_from_shipped_data_to_an_answer(launcher, shipped_split, tiny_base, tmp_path, request):
    if launcher == "deepspeed":
        done, adapter = request.getfixturevalue("launched")
    else:
        adapter = tmp_path
        own = "--model_name_or_path", tiny_base, "--data_path", shipped_split
        flags = """--per_device_train_batch_size 8 --model_max_length 256 --max_steps 3
            --learning_rate 1e-2 --logging_steps 1 --save_strategy no"""
        done = run_here(TRAIN, *own, "--output_dir", adapter, *shlex.split(flags))
    assert done.returncode == 0, done.stderr[-3000:]
    assert " 0 truncated " in done.stdout  # the splitter counted as the trainer renders
    asked = "--prompt", "Who are you?", "--temperature", 0, "--max_new_tokens", 8
    answers = [
        run_here("generate.py", "--base_model", tiny_base, *lora, *asked)
        for lora in ([], ["--lora_weights", adapter])
    ]
    assert [one.returncode for one in answers] == [0, 0]
    assert answers[0].stdout != answers[1].stdout


# Nothing to train or to run in: set-up, a server, and Meta's weights.
ELSEWHERE = {"make", "pip", "--input_dir"}
# What takes minutes or hours on a CPU, made short; all else is run as it is printed.
SHORTER = {
    "train_lora.py": "--per_device_train_batch_size 1 --max_steps 2",
    "evaluate.py": "--limit 2 --max_new_tokens 8",
}


@pytest.fixture
def copy(tmp_path, smollm2_gguf) -> Path:
    """The scripts and data of this project in a folder of their own, with the demo's weights."""
    for name in ("fastchat", "data"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("convert_llama_weights_to_hf.py", "generate.py", "deepspeed-config.json"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".demo").mkdir()
    (tmp_path / ".demo" / smollm2_gguf.name).symlink_to(smollm2_gguf)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "pages",
    [["README.md"], ["docs/base-model.md", "docs/corpus-stages.md", "docs/memory.md"]],
    ids=lambda pages: pages[0],
)
def test_the_commands_do_what_stands_below_them(pages, copy):
    """Pasted one after the other into a shell, they print what the documents say they do."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    told = 0
    for block in (block for page in pages for block in blocks(ROOT / page)):
        words = {word for command in commands(block.text) for word in command}
        if words & ELSEWHERE:
            continue
        done = subprocess.run(
            ["bash", "-ec", shorter(block.text)],
            cwd=copy,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, block.text + done.stderr[-3000:]
        if block.output:
            told += 1
            pattern = re.escape(block.output).replace("…", ".*")
            assert re.search(pattern, done.stdout, re.S), block.text + done.stdout
    assert told > 1


def shorter(text: str) -> str:
    """The commands with flags that make them short, on a port that nobody else has."""
    for script, flags in SHORTER.items():
        if script in text and "--dry_run" not in text:
            text = f"{text.rstrip()} {flags}"
    return text.replace("deepspeed --num_gpus=1", shlex.join(deepspeed(1)))
