"""Wheels for another machine: what they require that it lacks, and how to make one smaller."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from llama_lora.cli import InputError

LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(cpu|cuda|rocm|xpu)(\d*)\.so")

# ---- What is required ----


def read_requirements(path: Path, python: str) -> list[Requirement]:
    """What a requirements file names, or `pip freeze`, for Linux and that Python ("3.12").

    Raises:
        InputError: it cannot be read, or a line names no package.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        if not text or text.startswith("-"):
            continue
        try:
            found.append(Requirement(text))
        except InvalidRequirement:
            raise InputError(
                f"{path}: line {number}: expected NAME or NAME==VERSION, found {text!r}"
            ) from None
    return [requirement for requirement in found if applies(requirement, python)]


def applies(requirement: Requirement, python: str) -> bool:
    """Whether it holds for CPython of that version on Linux, without extras."""
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "extra": "",
    }
    return requirement.marker is None or requirement.marker.evaluate(machine)


def unmet(
    wanted: list[Requirement], present: list[Requirement], wheels: Iterable[Path], python: str
) -> dict[str, SpecifierSet]:
    """By name: the versions that can be taken of the packages that are missing.

    Args:
        wanted: for themselves, besides what the wheels require.
        present: what the machine has. Where no version is given, it counts as recent enough, and
            as none in particular.
        wheels: what is carried to it.
    """
    carried = list(distributions(path=list(map(str, wheels))))
    required = [Requirement(text) for one in carried for text in one.requires or []]
    versions: dict[str, SpecifierSet] = defaultdict(SpecifierSet)
    for requirement in [*wanted, *required]:
        if applies(requirement, python):
            versions[canonicalize_name(requirement.name)] &= requirement.specifier
    there = {canonicalize_name(one.name): _pin(one.specifier) for one in present}
    there |= {canonicalize_name(one.name): one.version for one in carried}
    return {
        name: wanted
        for name, wanted in versions.items()
        if name not in there or not _allows(wanted, there[name])
    }


def _pin(versions: SpecifierSet) -> str | None:
    return next((one.version for one in versions if one.operator == "=="), None)


def _allows(versions: SpecifierSet, found: str | None) -> bool:
    return versions.contains(found, prereleases=True) if found else not _pin(versions)


# ---- What a wheel holds ----


def surplus_libraries(wheel: Path, cuda: list[str]) -> set[str]:
    """The libraries of a bitsandbytes wheel but for the CPU's, and those for these CUDA versions.

    Raises:
        InputError: it has none for one of the versions.
    """
    with ZipFile(wheel) as archive:
        found = [match for name in archive.namelist() if (match := LIBRARY.fullmatch(name))]
    built = {Version(f"{m[2][:2]}.{m[2][2:]}"): m[0] for m in found if m[1] == "cuda"}
    kept = {built[loaded_for(Version(version), list(built))] for version in cuda}
    return {match[0] for match in found if match[1] != "cpu"} - kept


def loaded_for(cuda: Version, built: list[Version]) -> Version:
    """What bitsandbytes loads under a torch for `cuda`: the last build until then, else the first.

    Of the same major version alone, as in `bitsandbytes.cextension.get_cuda_bnb_library_path`.
    """
    same = [version for version in built if version.major == cuda.major]
    if not same:
        known = ", ".join(map(str, sorted(built)))
        raise InputError(f"--cuda {cuda}: bitsandbytes has no library for it, but for {known}")
    return max((version for version in same if version <= cuda), default=min(same))


def drop(wheel: Path, surplus: set[str]) -> None:
    """Take files out of a wheel, and out of its RECORD."""
    smaller = wheel.with_suffix(".part")
    with ZipFile(wheel) as old, ZipFile(smaller, "w") as new:
        for item in old.infolist():
            if item.filename not in surplus:
                content = old.read(item)
                if item.filename.endswith(".dist-info/RECORD"):
                    content = _without(content.decode(), surplus).encode()
                new.writestr(item, content)  # with the mode and the compression that it had
    smaller.replace(wheel)


def _without(record: str, surplus: set[str]) -> str:
    kept = io.StringIO()
    rows = csv.reader(io.StringIO(record))
    csv.writer(kept, lineterminator="\n").writerows(row for row in rows if row[0] not in surplus)
    return kept.getvalue()
