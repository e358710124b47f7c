"""When what answers come from was written: of the same files they are the same answers."""

from pathlib import Path


def last_modified(*paths: Path) -> dict[str, float]:
    """When each of these files was written, and of a model in one of these folders the last.

    0 where there is none.
    """
    files = {path: [path] if path.is_file() else _of_model(path) for path in paths}
    return {
        str(path.resolve()): max((one.stat().st_mtime for one in found), default=0)
        for path, found in files.items()
    }


def _of_model(folder: Path) -> list[Path]:
    """The files by which a model and its tokenizer answer."""
    kinds = "*.safetensors", "*model*.bin", "*config.json", "tokenizer.json", "chat_template.jinja"
    return [path for kind in kinds for path in folder.glob(kind)]
