"""Training's arguments, as its script has them."""

import runpy
import sys

import pytest

from tests.conftest import ROOT, TRAIN
from tests.train.commands import REQUIRED


@pytest.fixture
def parsed(monkeypatch):
    """The script's arguments, from those given after the required ones."""
    parse_args = runpy.run_path(str(ROOT / TRAIN))["parse_args"]

    def parse(*words):
        monkeypatch.setattr(sys, "argv", [str(ROOT / TRAIN), *REQUIRED, *map(str, words)])
        return parse_args()

    return parse
