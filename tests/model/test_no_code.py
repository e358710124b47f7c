"""No code of a model's or an adapter's folder ever runs, whatever stdin says."""

import ast
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_lora.chat.adapters import load
from llama_lora.cli import InputError
from llama_lora.model import adapter
from tests.conftest import ROOT, error_line, run_here
from tests.model.folder import readers

SOURCES = [
    *(ROOT / name for name in ("generate.py", "convert_llama_weights_to_hf.py")),
    *(
        path
        for name in ("llama_lora", "fastchat", "benchmarks", "tools")
        for path in (ROOT / name).rglob("*.py")
    ),
]
OURS = "PeftConfig", "PeftModel"  # they have no such flag, and run no code of an adapter


def calls(*names: str):
    """Where methods of these names are called, with the call."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in names:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def constant(call: ast.Call, name: str):
    values = [word.value for word in call.keywords if word.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def test_every_load_says_that_no_code_is_trusted():
    found = [
        (where, call)
        for where, call in calls("from_pretrained", "from_config")
        if not (isinstance(call.func.value, ast.Name) and call.func.value.id in OURS)
    ]
    assert len(found) > 8
    assert not [where for where, call in found if constant(call, "trust_remote_code") is not False]


def test_every_pickle_is_read_as_tensors_alone():
    found = [
        (where, call)
        for where, call in calls("load")
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
    ]
    assert len(found) > 1
    assert not [where for where, call in found if constant(call, "weights_only") is not True]


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """A file that is there once code of a folder has run; whoever asks is told to run it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    return tmp_path / "the code has run"


def with_code(folder: Path, marker: Path) -> Path:
    """Let a folder name Python code of its own wherever transformers and peft look for some."""
    code = f"open({str(marker)!r}, 'w').close()\n"
    names = {"AutoConfig": "Config", "AutoModelForCausalLM": "Model"}
    for name in ("code", "custom_generate/generate", "__init__"):
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code + "class Config: pass\nclass Model: pass\nclass Words: pass\n")
    changes = {
        "config.json": {
            "model_type": "of_its_own",
            "auto_map": {name: f"code.{kind}" for name, kind in names.items()},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Words",
            "auto_map": {"AutoTokenizer": [None, "code.Words"]},
        },
        "adapter_config.json": {
            "auto_mapping": {"base_model_class": "Model", "parent_library": "code"},
            "megatron_config": {"tensor_model_parallel_size": 1},
            "megatron_core": "code",
        },
        "generation_config.json": {"custom_generate": str(folder)},
    }
    for name, more in changes.items():
        if (path := folder / name).exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return folder


def test_code_of_a_base(tmp_path, marker, random_base, random_lora):
    base = with_code(shutil.copytree(random_base, tmp_path / "base"), marker)
    done = readers.all_of(base, random_lora, tmp_path)
    done["alone"] = readers.generate(base)
    corpus = readers.corpus(tmp_path)
    for script in ("inspect_data", "split_long_conversation"):
        flags = ["--in", corpus, "--model-name", base]
        flags += ["--out", tmp_path / "out.json"] if script.startswith("split") else []
        done[script] = run_here(f"fastchat/data/{script}.py", *flags)
    for script, ended in done.items():
        assert "code in a folder is never run" in error_line(ended), script
        assert "[y/N]" not in ended.stdout
    assert not marker.exists()


def test_code_of_an_adapter(tmp_path, marker, random_base, random_lora):
    lora = with_code(shutil.copytree(random_lora, tmp_path / "lora"), marker)
    done = readers.all_of(random_base, lora, tmp_path)
    assert done.pop("train").returncode == 0  # it is given none
    for script, ended in done.items():
        assert "code in a folder is never run" in error_line(ended), script
    for name in ("tokenizer_config.json", "tokenizer.json"):  # the rest is looked at, too
        (lora / name).unlink()
    assert f"{lora}: " in error_line(readers.generate(random_base, "--lora_weights", lora))
    assert not marker.exists()


def test_a_config_that_names_code_and_needs_none_is_used_without(tmp_path, marker, random_base):
    base = with_code(shutil.copytree(random_base, tmp_path / "base"), marker)
    for name, key, known in (
        ("config.json", "model_type", "llama"),
        ("tokenizer_config.json", "tokenizer_class", "LlamaTokenizer"),
    ):
        settings = json.loads((base / name).read_text()) | {key: known}
        (base / name).write_text(json.dumps(settings))
    assert readers.generate(base).returncode == 0
    assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_that_a_config_asks_for_are_not_fetched(tmp_path, random_base, random_lora, key):
    base = shutil.copytree(random_base, tmp_path / "base")
    for kernels in ("kernels-community/flash-attn2", "flash_attention_2"):
        settings = json.loads((base / "config.json").read_text()) | {key: kernels}
        (base / "config.json").write_text(json.dumps(settings))
        folder = tmp_path / Path(kernels).name
        folder.mkdir()
        for script, ended in readers.all_of(base, random_lora, folder).items():
            assert ended.returncode == 0, (script, ended.stderr)
        assert kernels not in (folder / "merged" / "config.json").read_text()


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("modern", [True, False])
def test_code_in_a_pickled_base(tmp_path, marker, random_base, random_lora, modern):
    base = shutil.copytree(random_base, tmp_path / "base")
    weights = load_file(base / "model.safetensors") | {"more": Payload(marker)}
    (base / "model.safetensors").unlink()
    file = base / "pytorch_model.bin"
    torch.save(weights, file, _use_new_zipfile_serialization=modern)
    for script, ended in readers.all_of(base, random_lora, tmp_path).items():
        expected = f"{file}: not loaded: expected tensors alone, found the code posix.mkdir"
        assert expected in error_line(ended), script
    assert not marker.exists()


def test_a_base_that_holds_an_adapter_is_refused(tmp_path, random_base, random_lora):
    """transformers would load both, and `merge_lora.py` the base alone."""
    base = shutil.copytree(random_base, tmp_path / "base")
    for name in (adapter.CONFIG, adapter.WEIGHTS):
        shutil.copy(random_lora / name, base)
    with pytest.raises(InputError, match="expected a base alone, found an adapter"):
        load(base)
