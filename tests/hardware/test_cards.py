"""What each card gets, by simulated capability."""

import pytest
import torch

from llama_lora.cli import InputError
from llama_lora.hardware import device, kernel_images
from llama_lora.hardware.cards import (
    BLACKWELL,
    CARDS,
    GIB,
    card_named,
    has_kernels,
    like,
    markdown_table,
)
from tests.conftest import ROOT, run_script
from tests.hardware.builds import BUILT_CU126, BUILT_CU130

CHECK = ROOT / "fastchat/train/check_machine.py"


@pytest.mark.parametrize(
    ("name", "default", "dtype", "attention", "triton", "build"),
    [
        ("P100", "8bit", torch.float16, "memory-efficient", False, "cu126"),
        ("V100", "8bit", torch.float16, "memory-efficient", True, "cu126"),
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


def test_4bit_is_refused_where_its_kernels_do_not_exist():
    old = like("Tesla M60", (5, 2), 8 * GIB)
    with pytest.raises(InputError, match="found Tesla M60 .*; use --quantization 8bit"):
        device.resolve_quantization("4bit", old)
    assert device.resolve_quantization("auto", old)[0] == "8bit"


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


def test_the_docs_hold_the_table():
    told = run_script(CHECK, "--cards").stdout
    tables = markdown_table(), kernel_images.markdown_table()
    assert told.strip() == "\n\n".join(tables)
    page = (ROOT / "docs/cards.md").read_text(encoding="utf-8")
    assert all(f"{table}\n" in page for table in tables)


def test_bitsandbytes_has_code_for_each_card_in_the_library_for_its_torch():
    compiled = {
        cuda: [f"sm_{major}{minor}" for major, minor in kernel_images.capabilities(path)]
        for cuda, path in kernel_images.bitsandbytes_libraries().items()
    }
    for card in CARDS.values():
        if card.capability is None:
            continue
        old = card.torch_build == "cu126"
        assert has_kernels(compiled["12.6"], card.capability) == (card.capability < BLACKWELL)
        assert has_kernels(compiled["13.0"], card.capability) == (not old)
