"""What can be counted in an answer without judging it."""

LONGEST_LOOP, LEAST_ROUNDS, LEAST_TOKENS = 64, 3, 24


def repetition(ids: list[int], size: int = 4) -> float | None:
    """The share of runs of `size` tokens that occur earlier in `ids` (Welleck et al. 2020,
    seq-rep).

    None if there is no such run.
    """
    runs = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else None


def is_looping(ids: list[int]) -> bool:
    """Whether `ids` end in one piece that repeats.

    It has at most `LONGEST_LOOP` tokens, and repeats at least `LEAST_ROUNDS` times and over at
    least `LEAST_TOKENS` tokens.
    """
    for period in range(1, LONGEST_LOOP + 1):
        size = max(LEAST_TOKENS, LEAST_ROUNDS * period)
        tail = ids[-size:]
        if len(tail) == size and tail[period:] == tail[:-period]:
            return True
    return False
