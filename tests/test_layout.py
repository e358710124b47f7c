"""The house stays in order: the name fastchat, the scripts' help, the direction of imports."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

from tests.conftest import ROOT, run_script

DATA_SCRIPTS = sorted(path.relative_to(ROOT) for path in ROOT.glob("fastchat/data/*.py"))
SCRIPTS = [
    *DATA_SCRIPTS,
    *sorted(path.relative_to(ROOT) for path in ROOT.glob("fastchat/train/*.py")),
    *sorted(path.relative_to(ROOT) for path in ROOT.glob("fastchat/eval/*.py")),
    *sorted(path.relative_to(ROOT) for path in ROOT.glob("fastchat/model/*.py")),
    "convert_llama_weights_to_hf.py",
    "generate.py",
]


def test_import_fastchat_means_fschat():
    """From this folder too: a package __init__.py of ours would hide the installed one."""
    code = "import fastchat, fastchat.conversation as c; print(fastchat.__file__, c.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all("site-packages" in path for path in done.stdout.split())
    assert not list(ROOT.glob("fastchat/**/__init__.py"))


def test_only_llama_lora_is_installed():
    """An installed `fastchat` of ours would overwrite fschat's files."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = find_packages(ROOT, **settings["tool"]["setuptools"]["packages"]["find"])
    assert found
    assert {name.split(".")[0] for name in found} == {"llama_lora"}


def test_no_text_says_python_m_fastchat():
    """It would run fschat's own script in silence."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Makefile"]
    texts += [ROOT / script for script in SCRIPTS]
    assert not [path for path in texts if "-m fastchat" in path.read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def training_help(tmp_path_factory):
    """What train_lora.py --help tells, which takes seconds, and the file of a fetched kernel."""
    return where_kernels_is(
        tmp_path_factory.mktemp("help"), "fastchat/train/train_lora.py", "--help"
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help(script, request):
    if str(script) == "fastchat/train/train_lora.py":
        done, _ = request.getfixturevalue("training_help")
    else:
        done = run_script(ROOT / script, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
    assert not done.stderr


@pytest.mark.parametrize(
    "script",
    [
        *DATA_SCRIPTS,
        "convert_llama_weights_to_hf.py",
        "generate.py",
        "fastchat/eval/evaluate.py",
        "fastchat/model/merge_lora.py",
    ],
    ids=str,
)
def test_help_imports_nothing_heavy(script):
    code = (
        "import runpy, sys\nsys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'polyglot', 'bs4') "
        "if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT / script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


AVX512_BF16 = """
import sys
class Hook:  # on any CPU, bitsandbytes finds the instructions that it would fetch code for
    def find_spec(self, name, path, target=None):
        if name == "bitsandbytes.backends.cpu.ops":
            sys.modules["bitsandbytes.functional"].has_avx512bf16 = lambda: True
sys.meta_path.insert(0, Hook())
"""


def where_kernels_is(folder, *command):
    """A script's run where a package `kernels` would be found, and the file that it would write."""
    marker = folder / "imported"
    (folder / "kernels.py").write_text(
        f"open({str(marker)!r}, 'a').write('kernels')\ndef get_kernel(*_, **__): return None\n"
    )
    (folder / "sitecustomize.py").write_text(AVX512_BF16)
    path = os.pathsep.join([str(folder), str(ROOT)])
    return run_script(*command, env={**os.environ, "PYTHONPATH": path}), marker


@pytest.mark.parametrize("script", ["train_lora.py", "generate.py"])
def test_no_code_comes_from_a_hub(script, tiny_base, tmp_path, request):
    """bitsandbytes and transformers fetch and run some where the package `kernels` is installed."""
    if script == "train_lora.py":
        done, marker = request.getfixturevalue("training_help")
    else:
        asked = "--prompt", "Hi!", "--max_new_tokens", 1, "--load_4bit", "--base_model", tiny_base
        done, marker = where_kernels_is(tmp_path, script, *asked)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()
    assert "kernels" not in done.stderr


LIBRARY = ROOT / "llama_lora"


def floors() -> dict[str, list[str]]:
    """From the bottom: each folder of the library, with those that it may import.

    The modules on top, `cli`, `options` and `text`, may be imported by all.
    """
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+)` \|[^|]*\|([^|]*)\|$", page, re.M)
    return {folder: re.findall(r"`([^`]+)`", imports) for folder, imports in rows}


def folder_of(path: Path) -> str:
    """A folder of the library by its name in the table; "" is its top."""
    return path.relative_to(LIBRARY).as_posix().removeprefix(".")


def imported_by(path: Path) -> set[str]:
    """The folders of the library that a module imports from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    folders = set()
    for name in names:
        if name.startswith("llama_lora."):
            found = LIBRARY.joinpath(*name.split(".")[1:])
            while not found.is_dir():
                found = found.parent
            folders.add(folder_of(found))
    return folders


def test_imports_point_downwards():
    allowed_in = floors()
    for path in LIBRARY.rglob("*.py"):
        folder = folder_of(path.parent)
        allowed = {folder, "", *allowed_in.get(folder, [])} if folder else {""}
        found = imported_by(path)
        assert found <= allowed, f"{path}: imports {sorted(found - allowed)}"


def test_each_floor_stands_on_lower_ones():
    """So no folders need one another, and one with subfolders lies above or below all of them."""
    folders = {folder_of(path.parent) for path in LIBRARY.rglob("[!_]*.py")}
    found = floors()
    assert set(found) == folders - {""}
    order = list(found)
    for folder, allowed in found.items():
        assert all(order.index(one) < order.index(folder) for one in allowed), folder
        inside = {order.index(one) < order.index(folder) for one in order if folder in parents(one)}
        assert len(inside) <= 1, folder


def parents(folder: str) -> set[str]:
    return {str(one) for one in Path(folder).parents}


def test_the_prompt_rests_on_nothing_else():
    """So that splitting, which imports it, knows neither models nor devices."""
    for name in "template", "labels":
        assert imported_by(LIBRARY / f"model/{name}.py") <= {"", "model"}, name


def test_no_folder_is_crowded():
    for top in "llama_lora", "benchmarks", "tests":
        for folder in {path.parent for path in (ROOT / top).rglob("[!_]*.py")}:
            modules = list(folder.glob("[!_]*.py"))
            assert len(modules) <= 12, f"{folder}: {len(modules)} modules"


def test_shared_fixtures_have_names_of_their_own():
    """So that a reader need not ask which folder's is meant."""
    shared = [path for path in ROOT.glob("tests/**/*.py") if not path.name.startswith("test_")]
    names = [
        node.name
        for path in shared
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    assert len(names) > 10
    assert sorted(names) == sorted(set(names))
