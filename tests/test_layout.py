"""The house stays in order: the name fastchat, the scripts' help, the direction of imports."""

import ast
import os
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, run_script
from setuptools import find_packages

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


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help(script):
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


@pytest.mark.parametrize(
    "command",
    [
        ["fastchat/train/train_lora.py", "--help"],
        ["generate.py", "--prompt", "Hi!", "--max_new_tokens", "1", "--load_4bit", "--base_model"],
    ],
    ids=lambda command: command[0],
)
def test_no_code_comes_from_a_hub(command, tiny_base, tmp_path):
    """bitsandbytes and transformers fetch and run some where the package `kernels` is installed."""
    marker = tmp_path / "imported"
    (tmp_path / "kernels.py").write_text(
        f"open({str(marker)!r}, 'a').write('kernels')\ndef get_kernel(*_, **__): return None\n"
    )
    (tmp_path / "sitecustomize.py").write_text(AVX512_BF16)
    base = [tiny_base] if command[-1] == "--base_model" else []
    done = run_script(*command, *base, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert not marker.exists()
    assert "kernels" not in done.stderr


# What each part of the library may import of it, besides itself.
LOWEST = {"cli", "options", "text"}  # which know nobody
MAY_IMPORT = {
    "cli": set(),
    "text": set(),
    "options": set(),
    "model": LOWEST,
    "corpus": {*LOWEST, "model"},
}
MAY_IMPORT["weights"] = {*LOWEST, "model"}
MAY_IMPORT["chat"] = {*LOWEST, "model", "corpus"}
MAY_IMPORT["train"] = {*LOWEST, "model", "corpus"}
MAY_IMPORT["report"] = {*LOWEST, "model", "corpus", "train"}
MAY_IMPORT["eval"] = {*LOWEST, "model", "corpus", "chat", "train", "report"}


def test_imports_point_one_way():
    for path in ROOT.glob("llama_lora/**/*.py"):
        inside = path.relative_to(ROOT / "llama_lora").with_suffix("").parts
        if inside == ("__init__",):
            continue
        allowed = MAY_IMPORT[inside[0]] | {inside[0]}
        if inside == ("model", "template"):
            allowed = LOWEST
        if inside[0] == "corpus" and inside[1] in ("files", "cutting", "values", "atomic"):
            allowed = {*LOWEST, "corpus"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                if module.startswith("llama_lora."):
                    assert module.split(".")[1] in allowed, f"{path}: imports {module}"


def test_shared_fixtures_have_names_of_their_own():
    """`pytest_plugins` of a test module counts for all: of one name, the last module's is used."""
    shared = [path for path in ROOT.glob("tests/*.py") if not path.name.startswith("test_")]
    names = [
        node.name
        for path in shared
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    assert len(names) > 10
    assert sorted(names) == sorted(set(names))
