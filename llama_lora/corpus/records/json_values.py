"""JSON values of a corpus: read leniently, written strictly."""

import json
import math
from typing import Any

import orjson

from llama_lora.text import sound_text


def parses(raw: bytes) -> bool:
    """Whether `parse` can read `raw`."""
    try:
        parse(raw)
    except ValueError:
        return False
    return True


def parse(raw: bytes) -> tuple[Any, bool]:
    """The JSON value in `raw`, and whether leniency was needed.

    Leniency means: NaN and infinite numbers become null, strings may hold raw control characters,
    and lone surrogates are kept as they are. Raises `ValueError` for what is not JSON.
    """
    try:
        value = orjson.loads(raw)
        if not holds_huge_number(value):
            return value, False
        fault = ""
    except orjson.JSONDecodeError as error:
        fault = str(error)
    try:
        text = raw.decode()
        value = json.loads(text, strict=False, parse_constant=lambda _: None, parse_float=finite)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError(fault or "a number has too many digits") from None
    return value, bool(fault)


def holds_huge_number(value: Any) -> bool:
    """Whether a number in `value` is beyond 64 bits, which orjson rounds to a float."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, float) and abs(item) >= 2**63:
            return True
    return False


def finite(digits: str) -> float | None:
    """The number, or None if it is too large for a float."""
    number = float(digits)
    return number if math.isfinite(number) else None


def dump(value: Any) -> bytes:
    """`value` as one line of JSON in UTF-8. Raises `ValueError` if it is nested too deeply."""
    try:
        return orjson.dumps(value)
    except TypeError:
        pass  # whole numbers over 64 bits, lone surrogates, deep nesting
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return sound_text(text).encode()
