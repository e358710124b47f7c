"""Tokens on disk: kept from run to run, and read by all processes on a machine.

An entry is two files: `KEY.arrow` with the examples, `KEY.N.json` with the account of them. The
account is put in place last, so its existence means that the entry is complete.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from llama_lora.cli import InputError
from llama_lora.corpus.records.atomic_files import Outputs
from llama_lora.model.template import Template

FORMAT = 1  # to be raised when the same corpus and settings give other tokens or other files
ACCOUNT = 2  # to be raised when the account's contents change


def default_folder() -> Path:
    """The default folder, on the machine's own disk and shared by all runs.

    The output folder would be slow: it is often on a network drive, and tokens are read bit by bit.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LLAMA_LORA_CACHE") or Path(home, "llama_lora"))


def key_of(path: str, template: Template, max_length: int) -> str:
    """A hash of everything that the tokens of the corpus at `path` depend on."""
    tokenizer = template.tokenizer
    settings = [
        FORMAT,
        max_length,
        template.jinja,
        tokenizer.special_tokens_map,
        tokenizer.backend_tokenizer.to_str(),
    ]
    try:
        with open(path, "rb") as file:
            running = hashlib.file_digest(file, hashlib.blake2b)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    running.update(json.dumps(settings).encode())
    return running.hexdigest()[:32]


class Entry:
    """The examples of one corpus under one key; they may not be written yet."""

    def __init__(self, folder: Path, key: str):
        self.tokens, self.account = folder / f"{key}.arrow", folder / f"{key}.{ACCOUNT}.json"

    def exists(self) -> bool:
        return self.account.is_file() and self.tokens.is_file()

    def write(self, batches: Iterable[dict[str, list]], account: dict) -> None:
        """Write both files completely, or not at all.

        Args:
            batches: columns of `schema()`, with some rows each.
            account: numbers; it is read after the last of `batches`.

        Raises:
            InputError: the folder cannot be written to.
        """
        import pyarrow

        try:
            self.tokens.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.tokens.parent}: {error.strerror}; --token_cache DIR names another place"
            ) from None
        with Outputs() as outputs:
            file = outputs.open(str(self.tokens))
            with pyarrow.ipc.new_stream(file, schema()) as writer:
                for columns in batches:
                    writer.write_batch(pyarrow.record_batch(columns, schema()))
            outputs.open(str(self.account)).write(json.dumps(account).encode())

    def read(self):
        """The examples, memory-mapped as Arrow tables, and the account."""
        import datasets

        rows = datasets.Dataset.from_file(str(self.tokens)).with_format("arrow")
        return rows, json.loads(self.account.read_text())


def schema():
    """The columns: where `labelled` is set, the label is the id, so a token takes 33 bits."""
    import pyarrow

    return pyarrow.schema(
        {
            "id": pyarrow.string(),
            "source": pyarrow.string(),
            "ids": pyarrow.list_(pyarrow.int32()),
            "labelled": pyarrow.list_(pyarrow.bool_()),
        }
    )
