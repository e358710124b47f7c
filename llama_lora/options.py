"""What scripts' command lines are made of."""

import argparse
import math
import re

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and example commands as they can be pasted."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)


def between(low, high=math.inf, kind=float, above=False):
    """An argparse type: numbers from `low` (or only above it) to `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or above and value == low:
            limits = f"{'above' if above else 'at least'} {low}"
            limits += f", at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"expected a number {limits}, found {text}")
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid float value"
    return parse


def fraction(text: str) -> float:
    """An argparse type: numbers between 0 and 1, both excluded."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, found {text}")
    return value


def flag(text: str) -> bool:
    """An argparse type: True or False, as `--flag True`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return text.lower() == "true"


def batch_size(text: str) -> int | None:
    """An argparse type: a whole number of at least 1, or None for "auto"."""
    return None if text == "auto" else between(1, kind=int)(text)


def file_size(text: str) -> int:
    """An argparse type: "500MB" -> 500,000,000 bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B)", text.upper())
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, found {text!r}")
    return round(float(match[1]) * UNITS[match[2]])
