"""For which compute capabilities a CUDA library was compiled, read from the library itself."""

import importlib.util
import re
import struct
from pathlib import Path

FAT_BINARY = struct.pack("<I", 0xBA55ED50)  # how nvcc's container for code of several cards begins
MACHINE_CODE = 2  # the other kind is PTX, which a driver compiles for later cards


def capabilities(library: Path) -> list[tuple[int, int]]:
    """The compute capabilities that `library` has machine code for, lowest first."""
    content, at, found = library.read_bytes(), 0, set()
    while (at := content.find(FAT_BINARY, at)) >= 0:
        header, size = struct.unpack_from("<HQ", content, at + 6)
        end, at = at + header + size, at + header
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", content, at)
            (architecture,) = struct.unpack_from("<I", content, at + 28)
            if kind == MACHINE_CODE:
                found.add(divmod(architecture, 10))
            at += header + size
    return sorted(found)


def bitsandbytes_libraries() -> dict[str, Path]:
    """bitsandbytes' installed libraries by the CUDA version they are for: "12.6"."""
    folder = Path(importlib.util.find_spec("bitsandbytes").origin).parent
    named = {
        path: re.fullmatch(r"libbitsandbytes_cuda(\d+)(\d)\.so", path.name)
        for path in sorted(folder.glob("*.so"))
    }
    return {".".join(match.groups()): path for path, match in named.items() if match}


def markdown_table() -> str:
    """What bitsandbytes' libraries were compiled for, for docs/cards.md."""
    rows = ["CUDA | compiled for", "--- | ---"]
    for cuda, path in bitsandbytes_libraries().items():
        rows.append(f"{cuda} | " + ", ".join("{}.{}".format(*one) for one in capabilities(path)))
    return "\n".join(f"| {row} |" for row in rows)
