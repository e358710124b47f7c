"""Kernels counted without a card."""

import pytest

from benchmarks.training import launches


@pytest.fixture
def of_a_layer(monkeypatch):
    """Counts those that one more layer starts."""

    def count(*options) -> int:
        found = []
        for layers in (2, 3):
            monkeypatch.setitem(launches.SHAPE, "num_hidden_layers", layers)
            found.append(launches.counted(*options))
        return found[1] - found[0]

    return count


@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_starts_two_thirds_of_the_kernels(of_a_layer, recompute):
    ours, plain = (of_a_layer("8bit", recompute, own) for own in (True, False))
    assert 100 < ours < 0.67 * plain


def test_a_layer_dequantizes_its_seven_weights_twice(of_a_layer):
    assert of_a_layer("8bit", False, True) - of_a_layer("none", False, True) == 2 * 7
