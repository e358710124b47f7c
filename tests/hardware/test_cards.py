"""What each card gets, by simulated capability, and the check of the machine, run on the CPU."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from llama_lora.check_machine import checks, kernels_used, probe, screen
from llama_lora.cli import InputError
from llama_lora.hardware import device
from llama_lora.hardware.cards import (
    BLACKWELL,
    CARDS,
    GIB,
    card_named,
    has_kernels,
    like,
    markdown_table,
)
from llama_lora.train import arguments
from tests.conftest import ROOT, run_script

CHECK = ROOT / "fastchat/train/check_machine.py"
CU126 = "pip install torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126"


# The builds of torch as they come, by `torch.cuda.get_arch_list()`.
BUILT_CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
BUILT_CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("name", "default", "dtype", "attention", "triton", "build"),
    [
        ("P100", "4bit", torch.float16, "memory-efficient", False, "cu126"),
        ("V100", "4bit", torch.float16, "memory-efficient", True, "cu126"),
        ("T4", "8bit", torch.float16, "memory-efficient", True, None),
        ("A10", "8bit", torch.bfloat16, "FlashAttention", True, None),
        ("RTX 3090", "8bit", torch.bfloat16, "FlashAttention", True, None),
        ("RTX 4090", "8bit", torch.bfloat16, "FlashAttention", True, None),
        ("A100", "8bit", torch.bfloat16, "FlashAttention", True, None),
        ("H100", "8bit", torch.bfloat16, "FlashAttention", True, None),
    ],
)
def test_what_a_card_gets(name, default, dtype, attention, triton, build):
    card = CARDS[name]
    assert device.resolve_quantization("auto", card)[0] == default
    assert device.compute_dtype(card) == dtype
    assert (card.attention, card.runs_triton, card.torch_build) == (attention, triton, build)
    peak = {torch.float16: card.fp16, torch.bfloat16: card.bf16}[dtype]
    assert card.peak_flops == peak * 1e12
    for wanted in ("4bit", "none"):
        assert device.resolve_quantization(wanted, card)[0] == wanted


def test_what_the_cpu_gets():
    card = CARDS["CPU"]
    assert device.resolve_quantization("auto", card)[0] == "8bit"
    assert device.compute_dtype(card) in (torch.float32, torch.bfloat16)
    assert card.peak_flops is None
    assert not card.runs_triton


@pytest.mark.parametrize("name", ["P100", "V100"])
def test_8bit_is_refused_where_its_kernels_do_not_exist(name):
    with pytest.raises(InputError, match=rf"found {name} .*; use --quantization 4bit"):
        device.resolve_quantization("8bit", CARDS[name])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("T4", "T4"),
        ("p100", "P100"),
        ("Tesla P100-PCIE-16GB", "P100"),
        ("V100 16 GB", "V100"),
        ("rtx 3090", "RTX 3090"),
        ("3090Ti", "RTX 3090"),
        ("RTX4090", "RTX 4090"),
        ("2080 ti", "RTX 2080 Ti"),
        ("A100-SXM4-40GB", "A100"),
        ("A100 80GB", "A100 80GB"),
        ("a10g", "A10G"),
        ("cpu", "CPU"),
    ],
)
def test_a_card_by_name(text, name):
    assert card_named(text) == CARDS[name]


def test_a_card_by_name_and_size():
    card = card_named("V100 32GB")
    assert (card.capability, card.memory) == ((7, 0), 32 * 10**9)
    assert "29.8 GiB" in card.name


@pytest.mark.parametrize(
    ("text", "memory"), [("16GiB", 16 * GIB), ("24 gib", 24 * GIB), ("16 GB", 16 * 10**9)]
)
def test_a_size_alone_is_taken_to_be_like_a_t4(text, memory):
    card = card_named(text)
    assert (card.memory, card.capability) == (memory, (7, 5))
    assert card.peak_flops == CARDS["T4"].peak_flops
    assert "assumed to be like a T4" in card.shown


@pytest.mark.parametrize("text", ["K80", "RTX 2080", "L40S 48GB", "16", "", "GiB", "big"])
def test_an_unknown_name_tells_the_known_ones(text):
    with pytest.raises(InputError) as error:
        card_named(text)
    assert all(name in str(error.value) for name in [*CARDS, "16GiB"])
    assert str(error.value).startswith(text)


@pytest.mark.parametrize(
    ("name", "capability", "gib", "like_name"),
    [
        ("Tesla T4", (7, 5), 14.56, "T4"),
        ("Tesla V100-SXM2-32GB", (7, 0), 31.7, "V100"),
        ("NVIDIA A100 80GB PCIe", (8, 0), 79.1, "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", (9, 0), 79.1, "H100"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 15.7, "RTX 4090"),
    ],
)
def test_a_card_that_is_here_keeps_what_cuda_says(name, capability, gib, like_name):
    card = like(name, capability, round(gib * GIB))
    assert (card.name, card.capability, card.memory) == (name, capability, round(gib * GIB))
    assert card.peak_flops == CARDS[like_name].peak_flops


def test_an_unknown_card_that_is_here_goes_by_its_capability():
    newer = like("NVIDIA GeForce RTX 5090", (12, 0), 31 * GIB)
    assert (newer.dtype, newer.attention) == ("bfloat16", "FlashAttention")
    assert newer.peak_flops == CARDS["T4"].peak_flops
    older = like("Quadro P6000", (6, 1), 23 * GIB)
    assert not older.runs_int8
    assert older.peak_flops == CARDS["P100"].peak_flops


def test_kernels_are_found_as_torch_finds_them():
    """Against the table of builds and the rule that the pinned torch itself carries."""
    for release, by_host in torch.cuda.PYTORCH_RELEASES_CODE_CC.items():
        codes = by_host["x86_64"]
        built_for = [f"sm_{code}" for code in codes]
        for card in CARDS.values():
            if card.capability is None:
                continue
            number = card.capability[0] * 10 + card.capability[1]
            runs = any(torch.cuda._code_compatible_with_device(number, code) for code in codes)
            assert has_kernels(built_for, card.capability) == runs, (release, card.name)
            old, new = card.torch_build is not None, card.capability >= BLACKWELL
            assert runs == (not new if release == "12.6" else not old)


def test_code_that_is_compiled_on_the_spot_runs_on_later_cards():
    assert has_kernels(BUILT_CU130, (12, 1))
    assert has_kernels(BUILT_CU130, (13, 0))
    assert not has_kernels(BUILT_CU126, (10, 0))
    assert has_kernels(["sm_90a"], (9, 0))


@pytest.mark.parametrize("name", ["P100", "V100"])
def test_a_build_without_the_cards_kernels_stops_with_the_right_one(name):
    finding = checks.card_with_torch(CARDS[name], 15 * GIB, "2.13.0+cu130", BUILT_CU130, "2.13.0")
    assert finding.stops
    assert not finding.ok
    assert finding.remedy == CU126
    assert "no kernels for it, only sm_75" in finding.found
    right = checks.card_with_torch(CARDS[name], 15 * GIB, "2.13.0+cu126", BUILT_CU126, "2.13.0")
    assert right.ok
    assert not right.remedy


def test_another_torch_than_the_pinned_one_is_told_and_goes_on():
    finding = checks.card_with_torch(CARDS["T4"], GIB, "2.10.0+cu128", BUILT_CU130, "2.13.0")
    assert not finding.ok
    assert not finding.stops
    assert finding.remedy == "pip install --force-reinstall torch==2.13.0"


@pytest.mark.parametrize(
    ("known", "cuda", "remedy"),
    [
        (("Tesla P100-PCIE-16GB", (6, 0)), None, CU126),
        (("Tesla T4", (7, 5)), None, "pip install --force-reinstall torch==2.13.0"),
        (("Tesla T4", (7, 5)), "13.0", CU126),
        (
            ("NVIDIA GeForce RTX 5080", (12, 0)),
            "13.0",
            "update the NVIDIA driver, to 580 or newer",
        ),
    ],
)
def test_a_card_that_torch_does_not_reach_stops(known, cuda, remedy):
    finding = checks.card_out_of_reach(known, "2.13.0", cuda, "2.13.0")
    assert finding.stops
    assert finding.remedy == remedy
    assert known[0] in finding.found


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch reaches the card of this machine")
def test_a_card_that_the_driver_alone_sees_is_not_passed_over(driver_with_a_p100, monkeypatch):
    """A build for CPUs on a machine with a card would train there, for months."""
    (finding,) = checks.devices("2.13.0")
    assert finding.stops
    assert finding.found.startswith("Tesla P100-PCIE-16GB, but torch")
    assert finding.remedy == CU126
    assert checks.setup_command().startswith(
        "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu126 make setup"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    (finding,) = checks.devices(torch.__version__.partition("+")[0])
    assert finding.ok
    assert finding.found.startswith("CPU")


@pytest.mark.parametrize(
    ("quantization", "least", "most"),
    [("none", 0.0, 1e-5), ("8bit", 1e-3, 0.02), ("4bit", 0.02, 0.1)],
)
def test_a_base_trains_on_cpu(quantization, least, most):
    """As far from fp32 as its bits make it; no error at all would mean full precision."""
    assert least <= probe.base_error(quantization, torch.float32, "cpu") <= most


def test_the_8bit_optimizer_steps_on_cpu():
    assert 1e-4 <= probe.optimizer_error("cpu") <= 0.05


@pytest.mark.parametrize("spoiled", [0.0, float("nan"), 2.0])
def test_a_wrong_result_is_told(spoiled):
    right = [torch.ones(4), torch.ones(4)]
    with pytest.raises(probe.WrongResult):
        probe._largest_error([right[0], right[1] * spoiled], right, tolerance=0.15)


def test_attention_kernels_on_cpu():
    finding = checks.attention()
    assert finding.ok
    assert "FlashAttention" in finding.found.split("unavailable: ")[0]
    assert "memory-efficient" in finding.found.split("unavailable: ")[1]


def test_packages_that_differ_have_one_command():
    pins = {name: version(name) for name in ("numpy", "tqdm", "orjson", "jinja2")}
    pins |= {"torch": "1", "peft": "0.0.1", "pycld2": "0.0", "no-such-package": "3.2"}
    finding = checks.packages(pins)
    assert not finding.ok
    assert finding.found.startswith("4 of 7 as pinned; peft 0.")
    assert "no-such-package missing, pinned 3.2" in finding.found
    assert finding.remedy.endswith("pip install peft==0.0.1 pycld2==0.0 no-such-package==3.2")
    assert "apt-get install -y libicu-dev" in finding.remedy  # pycld2 is built on the spot


def test_what_cannot_be_imported_is_told():
    finding = checks.imports("corpus", ("json", "no_such_module"), "pip install it", stops=True)
    assert (finding.ok, finding.stops, finding.remedy) == (False, True, "pip install it")
    assert "no_such_module" in finding.found


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = checks.compiler()
    assert not finding.ok
    assert "apt-get install -y g++ ninja-build" in finding.remedy


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
    assert "torch dequantizes, no kernel of bitsandbytes" in told["8-bit base"]
    assert "bitsandbytes' dequantize_4bit" in told["4-bit base"]
    course = (
        r"8bit base, float32: loss ([\d.]+) → ([\d.]+) in 10 steps of 512 tokens, "
        r"[\d,]+ tokens/s, peak memory [\d.]+ GiB, attention FlashAttention"
    )
    first, last = map(float, re.fullmatch(course, told["learning"]).groups())
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


@pytest.mark.parametrize("kernel", ["FlashAttention", "plain"])
def test_a_kernel_is_known_by_its_operators(kernel):
    with kernels_used.Operators() as seen:
        probe._attend(probe.ATTENTION_KERNELS[kernel], torch.float32, "cpu")
    assert kernels_used.attention(seen.names) == kernel


def test_the_docs_hold_the_table():
    done = run_script(CHECK, "--cards")
    assert done.stdout.strip() == markdown_table()
    assert done.stdout in (ROOT / "docs/cards.md").read_text(encoding="utf-8")


def test_a_folder_that_does_not_exist_is_a_usage_error(tmp_path):
    done = run_script(CHECK, "--folder", tmp_path / "none")
    assert done.returncode == 2
    assert "no such folder" in done.stderr


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
