"""How far a mean loss can be trusted: the paired bootstrap over conversations (Efron 1979).

Tokens and pieces of one conversation are not independent observations, so whole conversations are
drawn. The same draws serve all columns, so that what two models have in common cancels out in the
interval of their difference (Koehn 2004).
"""

from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
BLOCK = 100  # draws at a time: a table with that many rows, and a column per conversation
LIMITS = 2.5, 97.5  # percentiles


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval; a single conversation has no interval."""

    value: float
    low: float | None
    high: float | None


def ratios(sums: np.ndarray, weights: np.ndarray, seed: int) -> list[Estimate]:
    """The total of each column of `sums` ([conversations, columns]), divided by that of `weights`.

    Args:
        weights: of each conversation, its labelled tokens.
        seed: of the draws.
    """
    values = sums.sum(0) / weights.sum()
    if len(weights) == 1:
        return [Estimate(float(value), None, None) for value in values]
    generator = np.random.default_rng(seed)
    chances = np.full(len(weights), 1 / len(weights))
    drawn = np.concatenate(
        [
            ratio(generator.multinomial(len(weights), chances, BLOCK), sums, weights)
            for _ in range(DRAWS // BLOCK)
        ]
    )
    lows, highs = np.percentile(drawn, LIMITS, axis=0)
    return [Estimate(*map(float, row)) for row in zip(values, lows, highs, strict=True)]


def ratio(times: np.ndarray, sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The ratios of each draw; `times` says how often each conversation is in it."""
    return (times @ sums) / (times @ weights)[:, None]
