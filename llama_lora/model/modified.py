"""When the files that answers depend on were written: the same files give the same answers."""

from pathlib import Path


def last_modified(*paths: Path) -> dict[str, float]:
    """When each of these files was last written; for a model folder, the newest of its files.

    0 if there is no such file.
    """
    files = {path: [path] if path.is_file() else _of_model(path) for path in paths}
    return {
        str(path.resolve()): max((one.stat().st_mtime for one in found), default=0)
        for path, found in files.items()
    }


def _of_model(folder: Path) -> list[Path]:
    """The files of a model and its tokenizer that answers depend on."""
    kinds = "*.safetensors", "*model*.bin", "*config.json", "tokenizer.json", "chat_template.jinja"
    return [path for kind in kinds for path in folder.glob(kind)]
