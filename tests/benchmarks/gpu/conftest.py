"""What is measured: a base that is made on the spot, and results that are empty."""

import sys
from argparse import Namespace

import pytest

from benchmarks.gpu.contenders import base
from benchmarks.gpu.report.results import Results


@pytest.fixture(scope="module")
def made_base(tmp_path_factory):
    return base.made(tmp_path_factory.mktemp("gpu"), "tiny", "7B")


@pytest.fixture
def results(tmp_path):
    """Of a run in which nothing was measured yet, and no base was made."""
    args = Namespace(shape="tiny", gib=16, steps=1, only=["reference NF4"], resume=False)
    args.cache, args.out, args.unsloth = tmp_path, tmp_path / "out", sys.executable
    device = {"name": "CPU", "capability": None, "peak_flops": 1e9, "planner_rate": 1e9}
    device |= {"cuda": None, "driver": None, "dtype": "float32"}
    return Results(args, device, ["unsloth"]), args


def named(rows, shape="tiny") -> dict:
    """The rows of a shape by their names."""
    every = rows.all_rows(rows.KINDS[shape])
    return {row.name: row for row in every if row != rows.CHECKS}
