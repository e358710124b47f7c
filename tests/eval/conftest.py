"""What is evaluated: an adapter on the tiny base, on conversations of several lengths."""

from pathlib import Path

import pytest

from tests.conftest import shipped
from tests.corpora import conversation, save
from tests.eval.evaluation import adapted


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base, tmp_path_factory) -> Path:
    return adapted(tiny_base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Conversations of several turns and lengths, one of them in two pieces."""
    items = shipped("dummy_en.json")[:12]
    items += [
        conversation("long", "Tell me more.", "Gladly. " * 30, "And?", "No."),
        conversation("p_0", "One?", "It is one of two.", piece_of="p"),
        conversation("p_1", "Two?", "It is the other, then.", piece_of="p"),
    ]
    return save(tmp_path_factory.mktemp("corpus") / "heldout.json", items)
