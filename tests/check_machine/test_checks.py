"""What check_machine.py looks at and tries, run on the CPU, and with simulated cards."""

import inspect
from importlib.metadata import version

import pytest
import torch

from llama_lora.check_machine import checks, kernels_used, probe
from llama_lora.hardware.cards import (
    CARDS,
    GIB,
)
from llama_lora.train.compute import attention_kernels
from tests.hardware.builds import BUILT_CU126, BUILT_CU130
from tests.train.compute.kernels import Recorded

CU126 = "pip install torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126"


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

    assert "in one call" not in finding.found  # a CPU has no such kernel


@pytest.mark.parametrize("kernel", probe.AT_ONCE)
def test_kernels_for_all_examples_are_compared_with_the_loop(kernel):
    with Recorded() as seen:
        assert probe.at_once_error(kernel, torch.bfloat16, "cpu") <= probe.ATTENTION_ERROR
    name = probe.AT_ONCE[kernel]
    forward, backward = seen.of(name)
    assert len(forward) == len(backward) == 2
    windows = {str(one.get("window_size")) for one in forward + backward}
    expected = {"varlen": {"[-1, 0]", "[49, 0]"}, "efficient": {"None", "50"}}
    assert windows == expected[name]
    ran = {function.name().partition(".")[0] for function, _ in seen.calls}
    assert kernel in kernels_used.attention(ran)


def test_what_a_card_would_say_of_them(monkeypatch):
    with Recorded():
        found, _, wrong = checks.at_once(torch.bfloat16, "cpu")
    assert found.startswith("all examples in one call: FlashAttention 0.")
    assert "memory-efficient 0." in found
    assert wrong == []
    # As torch's own backward pass of the memory-efficient kernel: it forgets the window.
    given = attention_kernels._for_both

    def forgetful(begins, longest, window, scale):
        backward = inspect.stack()[1].function == "backward"
        return given(begins, longest, None if backward else window, scale)

    monkeypatch.setattr(attention_kernels, "_for_both", forgetful)
    with Recorded():
        found, _, wrong = checks.at_once(torch.bfloat16, "cpu")
    assert "wrong: memory-efficient" in found
    assert wrong == ["memory-efficient"]
    found, right, _ = checks.at_once(torch.bfloat16, "cpu")  # which has neither
    assert found == (
        "all examples in one call: none runs; unavailable: FlashAttention, memory-efficient"
    )
    assert right == []


@pytest.mark.parametrize("missing", ["memory-efficient", "FlashAttention"])
def test_a_card_trains_if_its_own_kernel_runs(missing, monkeypatch):
    def error(kernel, dtype, device):
        if kernel == missing:
            raise RuntimeError("CUDA error: no kernel image is available for execution")
        return 0.001

    monkeypatch.setattr(checks, "present", lambda: CARDS["T4"])
    monkeypatch.setattr(probe, "attention_error", lambda *_: 0.001)
    monkeypatch.setattr(probe, "at_once_error", error)
    assert checks.attention().stops == (missing == CARDS["T4"].attention)


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


@pytest.mark.parametrize("kernel", ["FlashAttention", "plain"])
def test_a_kernel_is_known_by_its_operators(kernel):
    with kernels_used.Operators() as seen:
        probe._attend(probe.ATTENTION_KERNELS[kernel], torch.float32, "cpu")
    assert kernels_used.attention(seen.names) == kernel
