"""The README's stages in order, each through its script, from the shipped data to an answer."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import DATA, deepspeed, run_here, run_script

SHIPPED = [DATA / name for name in ("dummy_en.json", "dummy_cn.json", "sharegpt_sample.json")]


def run(script, *flags):
    """Run a script in this process, or what is no script in one of its own; what it printed."""
    done = (run_here if script.endswith(".py") else run_script)(script, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def accounted(output: str) -> int:
    """Conversations kept, of a closing line that adds up."""
    numbers = re.findall(r"^read ([\d,]+) · kept ([\d,]+).* · rejected ([\d,]+)", output, re.M)
    read, kept, rejected = (int(number.replace(",", "")) for number in numbers[-1])
    assert read == kept + rejected
    return kept


@pytest.fixture(scope="module")
def split(tmp_path_factory, tiny_base) -> Path:
    """The corpus path on the shipped data."""
    folder = tmp_path_factory.mktemp("corpus")
    merged, clean, kept, split = (folder / f"{name}.json" for name in "mckS")
    total = sum(len(json.loads(path.read_text(encoding="utf-8"))) for path in SHIPPED)
    assert accounted(run("fastchat/data/merge.py", "--in", *SHIPPED, "--out", merged)) <= total
    accounted(run("fastchat/data/clean_sharegpt.py", "--in", merged, "--out", clean))
    accounted(
        run("fastchat/data/optional_clean.py", "--in", clean, "--out", kept, "--keep-lang", "en")
    )
    script = "fastchat/data/split_long_conversation.py"
    accounted(
        run(script, "--in", kept, "--out", split, "--model-name", tiny_base, "--max-length", "256")
    )
    return split


@pytest.mark.parametrize("launcher", ["python", "deepspeed"])
def test_from_shipped_data_to_an_answer(launcher, split, tiny_base, tmp_path):
    script = ["fastchat/train/train_lora.py"]
    if launcher == "deepspeed":
        script = [*deepspeed(2), *script, "--deepspeed", "./deepspeed-config.json"]
    own = ["--model_name_or_path", tiny_base, "--data_path", split, "--output_dir", tmp_path]
    flags = """--per_device_train_batch_size 8 --model_max_length 256 --max_steps 3
        --learning_rate 1e-2 --logging_steps 1 --save_strategy no"""
    output = run(*script, *own, *shlex.split(flags))
    assert " 0 truncated " in output  # the splitter counted as the trainer renders
    prompt = ["--prompt", "Who are you?", "--temperature", "0", "--max_new_tokens", "8"]
    base = ["generate.py", "--base_model", tiny_base]
    assert run(*base, "--lora_weights", tmp_path, *prompt) != run(*base, *prompt)
