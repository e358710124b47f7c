"""Conversations and files of them, written on the spot."""

import json
from pathlib import Path


def said(*texts: str, roles: tuple[str, str] = ("human", "gpt")) -> list[dict]:
    """Turns with these texts, a question first."""
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def conversation(name, *texts, roles=("human", "gpt"), **rest) -> dict:
    return {"id": name, "conversations": said(*texts, roles=roles), **rest}


def save(path: Path, items: list) -> Path:
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def save_lines(path: Path, items: list) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path
