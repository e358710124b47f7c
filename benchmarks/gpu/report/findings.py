"""The rows that were measured, by kind."""

from benchmarks.gpu.rows import SEARCHING


def measured(results: dict, contender: str | None = None) -> list[dict]:
    return [
        row
        for row in results["rows"].values()
        if row["status"] == "measured" and contender in (None, row["row"]["contender"])
    ]


def of(results: dict, contender: str, quantization: str, window: int) -> list[dict]:
    """Measured rows of a contender on the 7B, those with asked-for kernels left out."""
    return [
        row
        for row in measured(results, contender)
        if (row["row"]["quantization"], row["row"]["window"]) == (quantization, window)
        and row["row"]["kernel"] == "any"
        and row["row"]["base"] == "7B"
    ]


def fitting(row: dict) -> str:
    """The longest context that fits, as far as the search has come."""
    open_end = row["status"] == SEARCHING or not (row["fails_at"] or is_the_most(row))
    return f"{row['tokens']:,}{' or more' if open_end else ''}"


def is_the_most(row: dict) -> bool:
    """Whether nothing longer was worth trying."""
    return row["tokens"] == row["row"]["length"]
