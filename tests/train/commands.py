"""What the tests of training's command line share."""

from tests.conftest import TRAIN, run_here

REQUIRED = ["--model_name_or_path", "base", "--data_path", "split.json"]


def value_of(parts, name: str):
    return next(getattr(part, name) for part in parts if hasattr(part, name))


def refused(*words) -> list[str]:
    """Run the script: what its lines of error say, after which one names --help, and no more."""
    done = run_here(TRAIN, *words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    *faults, hint = done.stderr.splitlines()
    assert "--help" in hint
    assert not hint.startswith("error")
    assert all(fault.startswith("error: ") for fault in faults), done.stderr
    return [fault.removeprefix("error: ") for fault in faults]
