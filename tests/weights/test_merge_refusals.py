"""What cannot be merged is refused in one line, and the old output stays."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from llama_lora.chat.adapters import load
from llama_lora.cli import InputError
from llama_lora.model import adapter
from llama_lora.weights.merge_lora import merge
from tests.weights.merging import logits, make_base, refused


def test_neither_has_a_tokenizer(tmp_path, random_base, random_lora):
    for source, name in ((random_base, "base"), (random_lora, "lora")):
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("tok*", "chat*"))
    line = refused(tmp_path / "base", tmp_path / "lora", tmp_path / "out")
    assert f"{tmp_path}/base: no usable tokenizer here" in line


class Payload:
    """What a malicious adapter would have run when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_adapter_of_older_tools(tmp_path, random_base, random_lora):
    old = tmp_path / "old"
    shutil.copytree(random_lora, old)
    weights = load_file(old / adapter.WEIGHTS)
    (old / adapter.WEIGHTS).unlink()
    torch.save(weights, old / adapter.PICKLED)
    merge(random_base, random_lora, tmp_path / "a")
    merge(random_base, old, tmp_path / "b")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert logits(load(random_base, old)[0]).shape

    torch.save({**weights, "extra": Payload(tmp_path / "executed")}, old / adapter.PICKLED)
    line = refused(random_base, old, tmp_path / "out")
    assert "expected tensors alone, found the code" in line
    assert "mkdir" in line
    (old / adapter.PICKLED).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    assert "not loaded" in refused(random_base, old, tmp_path / "out")
    with pytest.raises(InputError, match="not loaded"):
        load(random_base, old)
    assert not (tmp_path / "executed").exists()
    (old / adapter.PICKLED).write_bytes(b"PK\3\4 cut off")
    assert "cannot be read" in refused(random_base, old, tmp_path / "out")
    torch.save([1, 2], old / adapter.PICKLED)
    assert "expected a dictionary of tensors" in refused(random_base, old, tmp_path / "out")


def changed(folder: Path, change) -> None:
    weights = load_file(folder / adapter.WEIGHTS)
    save_file(change(weights) or weights, folder / adapter.WEIGHTS)


def configured(folder: Path, **settings) -> None:
    path = folder / adapter.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


DAMAGED = {
    "truncated": (
        lambda f: os.truncate(f / adapter.WEIGHTS, (f / adapter.WEIGHTS).stat().st_size - 99),
        "cannot be read",
    ),
    "empty": (lambda f: (f / adapter.WEIGHTS).write_bytes(b""), "cannot be read"),
    "missing": (
        lambda f: (f / adapter.WEIGHTS).unlink(),
        "expected adapter_model.safetensors in it",
    ),
    "zero": (
        lambda f: changed(f, lambda w: {k: v * ("lora_B" not in k) for k, v in w.items()}),
        "every B matrix is still zero",
    ),
    "not finite": (
        lambda f: changed(f, lambda w: {k: v / 0 for k, v in w.items()}),
        "values that are not finite",
    ),
    "half of a pair": (
        lambda f: changed(
            f, lambda w: {k: v for k, v in w.items() if "1.mlp.down_proj.lora_B" not in k}
        ),
        "expected a B matrix that fits base_model.model.model.layers.1.mlp.down_proj.lora_A.weight",
    ),
    "config": (lambda f: (f / adapter.CONFIG).write_text("[1]"), "adapter_config.json: not an"),
    "another method": (lambda f: configured(f, peft_type="IA3"), "expected a LoRA adapter, found"),
    "rank": (lambda f: configured(f, r=5), "expected rank 5 of .*, found 4"),
    "PiSSA": (lambda f: configured(f, init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
    "bias": (lambda f: configured(f, lora_bias=True), "found lora_bias"),
    "more than LoRA": (
        lambda f: changed(f, lambda w: {**w, "base_model.model.lm_head.weight": torch.ones(2)}),
        "found base_model.model.lm_head.weight, which cannot be merged",
    ),
    "no magnitudes": (lambda f: configured(f, use_dora=True), "DoRA's 32 magnitudes of"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_adapter_is_one_line_and_leaves_nothing(tmp_path, random_base, random_lora, case):
    damage, expected = DAMAGED[case]
    shutil.copytree(random_lora, tmp_path / "lora")
    damage(tmp_path / "lora")
    line = refused(random_base, tmp_path / "lora", tmp_path / "a" / "out")
    assert line.startswith(f"error: {tmp_path}/lora")
    assert re.search(expected, line), line
    assert {path.name for path in tmp_path.iterdir()} == {"lora"}


OTHER_BASES = {
    "shape": ({"hidden_size": 64}, "expected model.layers.0.* of .*32.*, found .*64"),
    "fewer layers": ({"num_hidden_layers": 1}, "expected 2 layers, found 1"),
    "more layers": ({"num_hidden_layers": 3}, "expected 2 layers, found 3"),
    "vocabulary": ({"vocab_size": 1000}, "expected a vocabulary of 2,000, found 1,000"),
}


@pytest.mark.parametrize("case", OTHER_BASES)
def test_another_base_is_one_line(tmp_path, llama_tokenizer, random_lora, case):
    changes, expected = OTHER_BASES[case]
    other = make_base(tmp_path / "other", llama_tokenizer, **changes)
    line = refused(other, random_lora, tmp_path / "out")
    assert f"{random_lora}: this adapter was not made for the base {other}: " in line
    assert re.search(expected, line), line
    with pytest.raises(InputError) as error:  # the same line in generate.py
        load(other, random_lora)
    assert line == f"error: {error.value}"


def test_another_architecture_is_one_line(tmp_path, llama_tokenizer, random_lora):
    config = GPT2Config(vocab_size=2000, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    llama_tokenizer.save_pretrained(tmp_path / "gpt2")
    line = refused(tmp_path / "gpt2", random_lora, tmp_path / "out")
    assert "expected layers named down_proj, q_proj, v_proj, found" in line


def test_another_vocabulary_of_the_same_size_is_one_line(tmp_path, random_base, random_lora):
    shutil.copytree(random_base, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = state["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    line = refused(tmp_path / "other", random_lora, tmp_path / "out")
    assert f"expected token 1998 to be '{first}', found '{second}'" in line


def test_quantized_base_is_one_line(tmp_path, random_base, random_lora):
    shutil.copytree(random_base, tmp_path / "base")
    config = json.loads((random_base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    line = refused(tmp_path / "base", random_lora, tmp_path / "out")
    assert "expected 16-bit weights, found weights quantized with bitsandbytes" in line


def test_incomplete_base_is_one_line(tmp_path, random_base, random_lora):
    shutil.copytree(random_base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in weights if name != "model.norm.weight"}, file)
    assert "expected the tensor model.norm.weight, found none" in refused(
        tmp_path / "base", random_lora, tmp_path / "out"
    )
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, file)
    assert "expected model.norm.weight of shape (32,), found (31,)" in refused(
        tmp_path / "base", random_lora, tmp_path / "out"
    )
    os.truncate(file, 999)
    assert "model.safetensors: cannot be read" in refused(
        tmp_path / "base", random_lora, tmp_path / "out"
    )
    file.unlink()
    assert "expected model.safetensors or model.safetensors.index.json" in refused(
        tmp_path / "base", random_lora, tmp_path / "out"
    )


def test_old_output_stays_whole_until_the_new_one_is(tmp_path, random_base, random_lora):
    merge(random_base, random_lora, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "--overwrite replaces it" in refused(random_base, random_lora, tmp_path / "out")
    shutil.copytree(random_lora, tmp_path / "lora")
    changed(tmp_path / "lora", lambda w: {k: v * 1e6 for k, v in w.items()})  # beyond float16
    line = refused(random_base, tmp_path / "lora", tmp_path / "out", "--overwrite")
    assert "values beyond float16" in line
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "lora"}
    assert "expected a folder other than" in refused(
        random_base, random_lora, random_base, "--overwrite"
    )
