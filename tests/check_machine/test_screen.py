"""check_machine.py as users run it, and the screen that they paste."""

import re
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from llama_lora.check_machine import checks, screen
from llama_lora.hardware.cards import (
    GIB,
)
from tests.conftest import ROOT, run_script

CHECK = ROOT / "fastchat/train/check_machine.py"


def pasted(stdout: str) -> dict[str, str]:
    """The rows of the screen at the end of the output, by their names."""
    _, _, text = stdout.partition(f"\n{screen.HEADING}\n")
    shown = text.splitlines()
    assert 0 < len(shown) < screen.LINES
    assert max(map(len, shown)) <= screen.COLUMNS
    assert not re.search(r"(?<![\w…])/\w", text), "a folder"
    rows = re.findall(r"^(\S.{11}) (.*(?:\n {13}.*)*)", text, re.M)
    return {name.strip(): " ".join(words.split()) for name, words in rows}


def test_the_script_on_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run_script(CHECK, "--seconds", "0")
    marks = {
        what: mark
        for mark, what in re.findall(r"^(ok|--|FAIL) +(\S+(?: base| AdamW)?)", done.stdout, re.M)
    }
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("Python", "device", "training", "room", "corpus", "attention", "compiler"):
        assert marks[what] == "ok", done.stdout
    for what in ("8-bit base", "4-bit base", "unquantized", "8-bit AdamW", "learning"):
        assert marks[what] == "ok", done.stdout
    assert not done.stderr
    verdict = "Training can run here: 8bit base, float32"
    assert f"\n{verdict}\n" in done.stdout

    told = pasted(done.stdout)
    assert list(told)[-1] == "verdict"
    assert (told["verdict"], told["card"]) == (verdict, "none")
    for package in ("torch", "transformers", "peft", "bitsandbytes", "deepspeed"):
        assert f"{package} {version(package)}" in told["versions"]
    assert "libbitsandbytes_cpu.so" in told["versions"]
    assert "0 of 65,536 codes differ from bitsandbytes' own" in told["8-bit base"]
    assert "bitsandbytes' dequantize_4bit" in told["4-bit base"]
    expected = (
        r"8bit base, float32: loss ([\d.]+) → ([\d.]+) in 10 steps of 512 tokens, "
        r"[\d,]+ tokens/s, peak memory [\d.]+ GiB, attention FlashAttention"
    )
    first, last = map(float, re.fullmatch(expected, told["learning"]).groups())
    assert last < 0.8 * first


@pytest.mark.parametrize(
    ("learning_rate", "told"),
    [
        (0.0, r"WRONG: expected the loss to fall by 10%; .* loss [67]\.\d\d → (6\.9|7)"),
        (1e30, "WRONG: step 2: the loss is nan"),
    ],
    ids=["stands still", "diverges"],
)
def test_a_training_that_does_not_learn_is_wrong(learning_rate, told):
    finding = checks.learning(0, learning_rate)
    assert (finding.ok, finding.stops) == (False, True)
    assert re.match(told, finding.found), finding.found


def test_the_script_where_nothing_is_installed(driver_with_a_p100):
    """Without site-packages, as before set-up: it still says what is here, and what to do."""
    command = [sys.executable, "-I", "-S", str(CHECK)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "FAIL torch" in done.stdout
    assert "cu126 make setup && source .venv/bin/activate" in done.stdout
    verdict = "Training cannot run here yet: torch"
    assert f"\n{verdict}\n" in done.stdout
    assert not done.stderr
    told = pasted(done.stdout)
    card = "Tesla P100-PCIE-16GB (compute capability 6.0), 16384 MiB; torch cannot use it"
    assert (told["card"], told["driver"]) == (card, "NVIDIA 535.183.01")
    assert "torch missing" in told["versions"]
    assert (told["torch"], told["verdict"]) == ("FAIL not installed", verdict)


def test_the_screen_names_the_card_that_torch_reaches(driver_with_a_p100, monkeypatch):
    t4 = SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=round(14.56 * GIB))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: t4)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    told = pasted("\n" + "\n".join(screen.lines([], "Training can run here", ROOT)))
    assert told["card"] == "Tesla T4 (compute capability 7.5), 14.6 GiB; 2 cards"
    assert told["driver"] == "NVIDIA 535.183.01"
    assert f"torch {torch.__version__} (CUDA 12.6)" in told["versions"]


def test_the_screen_stays_one_however_much_is_wrong():
    fault = f"{ROOT}/llama_lora/x.py: " + "too bad " * 99
    findings = [checks.Finding(f"part {number}", fault, False) for number in range(20)]
    told = pasted("\n" + "\n".join(screen.lines(findings, "Training cannot run here", ROOT)))
    assert told["part 0"].startswith("-- …/x.py: too bad")
    assert told["part 0"].endswith("bad …")
    assert told["verdict"] == "Training cannot run here"


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("No such file: '/home/me and you/lib'", "No such file: '…'"),
        ("/opt/alice/libcuda.so.1: cannot open", "…/libcuda.so.1: cannot open"),
        ("41 tokens/s, 8/4 bits and/or none", "41 tokens/s, 8/4 bits and/or none"),
    ],
)
def test_what_is_pasted_names_nobody(text, public, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me and you")
    assert screen.without_folders(text) == public


def test_a_folder_that_does_not_exist_is_a_usage_error(tmp_path):
    done = run_script(CHECK, "--folder", tmp_path / "none")
    assert done.returncode == 2
    assert "no such folder" in done.stderr
