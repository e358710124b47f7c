"""What the tests of benchmarks/gpu_16gb.py share; a module names this one in `pytest_plugins`."""

import sys
from argparse import Namespace
from importlib import import_module

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def benchmark():
    """Import modules of benchmarks/, which is not installed."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield import_module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def made_base(benchmark, tmp_path_factory):
    return benchmark("gpu.base").made(tmp_path_factory.mktemp("gpu"), "tiny", "7B")


@pytest.fixture
def results(benchmark, tmp_path):
    """Of a run in which nothing was measured yet, and no base was made."""
    args = Namespace(shape="tiny", gib=16, steps=1, only=["reference NF4"], resume=False)
    args.cache, args.out, args.unsloth = tmp_path, tmp_path / "out", sys.executable
    device = {"name": "CPU", "capability": None, "peak_flops": 1e9, "planner_rate": 1e9}
    device |= {"cuda": None, "driver": None, "dtype": "float32"}
    return benchmark("gpu.results").Results(args, device, ["unsloth"]), args


def named(rows, shape="tiny") -> dict:
    """The rows of a shape by their names."""
    every = rows.all_rows(rows.KINDS[shape])
    return {row.name: row for row in every if row != rows.CHECKS}
