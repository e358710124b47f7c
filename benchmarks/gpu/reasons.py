"""Why something failed, in one line."""

MOST = 300  # characters


def first_line(error: BaseException) -> str:
    """Its type and the first line of what it says; CUDA's errors end with advice for developers."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else 'no more is said'}"[:MOST]


def last_line(log: str) -> str:
    """The last line of a log that says anything; "" if there is none."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:MOST] if lines else ""
