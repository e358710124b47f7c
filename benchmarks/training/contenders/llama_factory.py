"""LLaMA-Factory in an environment of its own, beside this project's, with the versions it wants."""

import subprocess
import sys
import venv
from pathlib import Path

from benchmarks import training_runs as runs

REQUIREMENTS = Path(__file__).with_name("llama-factory.txt")
# What it requires beyond text, by the versions that would go with torch. pip finds them installed.
# LLaMA-Factory imports torchaudio; of torchvision nothing can be imported, for that would be used.
STUBS = {"torchaudio": "2.13.0", "torchvision": "0.28.0"}
IMPORTED = "torchaudio.py"


def train(base: Path, data: Path, out: Path, cache: Path, *flags) -> runs.Run:
    """Run LLaMA-Factory's training on a corpus."""
    fitting, python = fitting_base(base, cache), environment(cache)
    return runs.recipe("llama_factory_recipe", fitting, data, out, *flags, python=python)


def environment(cache: Path) -> Path:
    """Its Python, in an environment that is made once, and anew if what it shall hold changes."""
    folder = cache / "llama-factory"
    python = folder / "bin/python"
    complete, wanted = folder / runs.COMPLETE, REQUIREMENTS.read_text()
    if not complete.exists() or complete.read_text() != wanted:
        print(f"making {folder}: some minutes, once", file=sys.stderr, flush=True)
        venv.create(folder, clear=True, with_pip=True)
        install_stubs(next(folder.glob("lib/python*/site-packages")))
        install = runs.words("-m pip install --quiet --disable-pip-version-check")
        subprocess.run([python, *install, "-r", REQUIREMENTS], check=True)
        complete.write_text(wanted)
    return python


def install_stubs(packages: Path) -> None:
    """Let packages seem to be installed that hold nothing."""
    for name, version in STUBS.items():
        about = packages / f"{name}-{version}.dist-info"
        about.mkdir()
        told = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (about / "METADATA").write_text(told)
    (packages / IMPORTED).touch()


def fitting_base(base: Path, cache: Path) -> Path:
    """The base in this machine's compute dtype, with the prompt of this project, made once.

    LLaMA-Factory keeps weights as they are stored, and would cast them again in every product.
    """
    from llama_lora.hardware.device import compute_dtype, dtype_name
    from llama_lora.model.base import load_base
    from llama_lora.model.template import Template, load_tokenizer

    folder = cache / f"base-{dtype_name(compute_dtype())}"
    complete = folder / runs.COMPLETE
    if not complete.exists() or complete.read_text() != str(base):
        load_base(base, device="cpu").save_pretrained(folder)
        Template(load_tokenizer(base)).tokenizer.save_pretrained(folder)
        complete.write_text(str(base))
    return folder
