"""Make a folder of the packages that a machine without a network lacks, to carry there.

python3 tools/carry.py --python 3.12

With them, train_lora.py, merge_lora.py, generate.py and benchmarks/gpu_16gb.py run where torch is
installed already.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.specifiers import SpecifierSet
from packaging.utils import parse_wheel_filename
from wheels import drop, read_requirements, surplus_libraries, unmet

from llama_lora.cli import InputError, one_line_errors
from llama_lora.options import Help, between

ROOT = Path(__file__).parents[1]
# As requirements.txt pins them; what they require comes along where it is missing.
CARRIED = "transformers", "peft", "bitsandbytes", "datasets", "orjson", "gguf", "deepspeed"
SOURCE_ONLY = "deepspeed"  # no wheels of it are published; of Python alone, it fits any machine
PLATFORMS = "_2_28", "_2_27", "_2_24", "_2_17", "2014", "2010", "1"  # of manylinux
README = """\
Packages for Python {python}, and for a torch whose torch.version.cuda is {cuda}.

In this folder:
python3 -m pip install --no-index --no-deps --no-compile --no-cache-dir --upgrade \\
    --target /tmp/site *.whl

Then in the project's:
export PYTHONPATH=/tmp/site:$PWD
"""
MIB = 2**20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    help = "Python of the machine, such as 3.11"
    add("--python", type=version, default="3.12", metavar="VERSION", help=help)
    help = (
        "the machine's torch.version.cuda, or all it may be; bitsandbytes takes 3 to 7 MiB for each"
    )
    cuda = {"nargs": "+", "type": version, "metavar": "VERSION"}
    add("--cuda", **cuda, default=["12.6", "12.8", "13.0"], help=help)
    help = "file of the packages that the machine has, from its `pip freeze`"
    target = ROOT / "tests/requirements-target.txt"
    add("--present", type=Path, default=target, metavar="FILE", help=help)
    add("--mib", type=between(0, above=True), default=60, help="largest size of the folder")
    help = "folder to write; it replaces that of an earlier run"
    add("--out", type=Path, default=ROOT / ".bench/carried", help=help)
    return parser.parse_args()


def version(text: str) -> str:
    """An argparse type: "12.8"."""
    if not re.fullmatch(r"\d+\.\d+", text):
        raise argparse.ArgumentTypeError(f"expected two numbers such as 3.12, found {text!r}")
    return text


@one_line_errors
def main(args: argparse.Namespace) -> None:
    with replacing(args.out) as folder:
        gather(folder, args)
        size = check_size(folder, args.mib)
        text = README.format(python=args.python, cuda=" or ".join(args.cuda))
        (folder / "README.txt").write_text(text, encoding="utf-8")
    print(f"{size:5.1f} MiB in {args.out}; README.txt says how to install them")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `out` when the block ends well.

    Raises:
        InputError: what stands at `out` is not of this script, or the disk refuses.
    """
    try:
        if out.exists() and not all(is_carried(path) for path in out.iterdir()):
            raise InputError(f"{out}: expected nothing there, or only carried packages")
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".carried-", dir=out.parent) as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            yield new
            if out.exists():
                out.rename(Path(scratch, "old"))
            new.rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None


def is_carried(path: Path) -> bool:
    return path.suffix == ".whl" or path.name == "README.txt"


def gather(folder: Path, args: argparse.Namespace) -> None:
    """Fetch what is wanted, then what that requires, until nothing is missing."""
    pins = read_requirements(ROOT / "requirements.txt", args.python)
    wanted = [one for one in pins if one.name in CARRIED]
    present = read_requirements(args.present, args.python)
    wheels: dict[str, Path] = {}
    while missing := unmet(wanted, present, wheels.values(), args.python):
        for name, versions in missing.items():
            if name in wheels:  # another package has asked for another version
                wheels[name].unlink()
            wheels[name] = wheel = fetch(name, versions, folder, args.python)
            if name == "bitsandbytes":
                drop(wheel, surplus_libraries(wheel, args.cuda))
            print(f"{mib(wheel):5.1f} MiB  {shown(wheel)}", flush=True)


def fetch(name: str, versions: SpecifierSet, folder: Path, python: str) -> Path:
    """Put the wheel of a package into the folder.

    Raises:
        InputError: pip finds none.
    """
    kind = ["wheel"]
    if name != SOURCE_ONLY:
        kind = ["download", "--only-binary=:all:", "--implementation=cp"]
        kind += [f"--python-version={python}"]
        kind += [f"--platform=manylinux{one}_x86_64" for one in PLATFORMS]
    with TemporaryDirectory(dir=folder.parent) as there:
        command = [sys.executable, "-m", "pip", *kind, "--no-deps", f"{name}{versions}"]
        done = subprocess.run(command, cwd=there, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            raise InputError(f"{name}{versions}: pip: {(said or [done.stderr])[-1]}")
        (wheel,) = Path(there).glob("*.whl")
        return wheel.rename(folder / wheel.name)


def check_size(folder: Path, limit: float) -> float:
    """MiB of the wheels. Raises `InputError` where they are more than the limit."""
    wheels = sorted(folder.glob("*.whl"), key=mib, reverse=True)
    size = sum(map(mib, wheels))
    if size > limit:
        sizes = ", ".join(f"{shown(wheel)} {mib(wheel):.1f}" for wheel in wheels)
        raise InputError(f"{size:.1f} MiB of packages, more than --mib {limit:g}: {sizes}")
    return size


def mib(file: Path) -> float:
    return file.stat().st_size / MIB


def shown(wheel: Path) -> str:
    name, number, *_ = parse_wheel_filename(wheel.name)
    return f"{name} {number}"


if __name__ == "__main__":
    main(parse_args())
