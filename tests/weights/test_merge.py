"""Merged models compute what base and adapter compute in peft."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_lora.chat.adapters import load
from llama_lora.model import adapter
from llama_lora.weights.merge_lora import merge
from tests.conftest import ROOT
from tests.weights.merging import TARGETS, command, loaded, logits, make_adapter, make_base

KINDS = {
    "LoRA": {},
    "all layers": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "down_proj": 3},
        "alpha_pattern": {"q_proj": 5},
        "use_rslora": True,
    },
    "head": {"target_modules": [*TARGETS, "lm_head"]},
}


@pytest.mark.parametrize(
    ("kind", "tied"),
    [*((kind, False) for kind in KINDS), ("LoRA", True), ("head", True)],
)
def test_merged_model_computes_what_peft_does_unmerged(tmp_path, llama_tokenizer, kind, tied):
    base = make_base(tmp_path / "base", llama_tokenizer, tie_word_embeddings=tied)
    lora = make_adapter(tmp_path / "lora", base, **KINDS[kind])
    expected = logits(PeftModel.from_pretrained(loaded(base), lora))
    assert (expected - logits(loaded(base))).abs().max() > 0.1
    merge(base, lora, tmp_path / "exact", torch.float32)
    torch.testing.assert_close(logits(loaded(tmp_path / "exact")), expected, atol=1e-4, rtol=0)

    merge(base, lora, tmp_path / "half")
    theirs = PeftModel.from_pretrained(loaded(base), lora).merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert ours.dtype == torch.float16
    assert ours.config.tie_word_embeddings is (tied and kind != "head")
    if tied and kind == "head":
        return  # peft itself would merge the head's change into the embeddings
    for name, tensor in ours.state_dict().items():
        rounding = {"atol": 1e-6, "rtol": 2**-10}  # the next of float16's numbers at most
        torch.testing.assert_close(tensor.float(), theirs[name], **rounding)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_sixteen_bits_stay_what_they_are(tmp_path, llama_tokenizer, stored):
    dtype = getattr(torch, stored)
    base = make_base(tmp_path / "base", llama_tokenizer, dtype)
    lora = make_adapter(tmp_path / "lora", base)
    written = merge(base, lora, tmp_path / "out")
    assert written.dtype == dtype
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 2 * len(TARGETS)
    assert all(name.split(".")[-2] in TARGETS for name in changed)
    assert all(tensor.dtype == dtype for tensor in after.values())


def test_shards_hold_the_same_and_transformers_reads_them(tmp_path, random_base, random_lora):
    whole = merge(random_base, random_lora, tmp_path / "whole")
    written = merge(random_base, random_lora, tmp_path / "cut", max_shard_size=10_000)
    assert written.files > 3
    assert (written.parameters, written.bytes) == (whole.parameters, whole.bytes)
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(files) == written.files
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found = {}
    for file in files:
        shard = load_file(file)
        assert sum(t.nbytes for t in shard.values()) <= 10_000 or len(shard) == 1
        found |= shard
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.bytes
    assert index["weight_map"].keys() == expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert name in load_file(tmp_path / "cut" / index["weight_map"][name])
    torch.testing.assert_close(
        logits(loaded(tmp_path / "cut")), logits(loaded(tmp_path / "whole")), atol=0, rtol=0
    )


def test_command_writes_a_folder_that_answers_as_base_and_adapter_do(
    tmp_path, random_base, random_lora
):
    target = tmp_path / "new" / "merged"
    done = command(random_base, random_lora, target, "--gguf", "F16", "Q8_0", "Q8_0")
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert first.startswith(f"wrote {target}: 0.1 M parameters in float16, 0.00 GB in 1 file(s), ")
    names = ["merged-F16.gguf", "merged-Q8_0.gguf"]
    assert others == [f"wrote {target}/{name}: 0.00 GB" for name in names]
    assert {path.name for path in target.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merged-F16.gguf",
        "merged-Q8_0.gguf",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float16"
    _, wanted, _ = load(random_base, random_lora)
    model, template, _ = load(target)
    question = [{"from": "human", "value": "Who are you?"}]
    assert template.prompt_ids(question) == wanted.prompt_ids(question)
    assert AutoTokenizer.from_pretrained(target).chat_template == wanted.jinja
    assert model.generation_config.eos_token_id == wanted.stop_ids


def test_generation_settings_come_along(tmp_path, random_base, random_lora):
    """Vicuna's and Llama 2's have a temperature and no do_sample, which transformers won't save."""
    shutil.copytree(random_base, tmp_path / "base")
    settings = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "eos_token_id": [7]}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    merge(tmp_path / "base", random_lora, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {**settings, "eos_token_id": [2, 7], "bos_token_id": 1, "pad_token_id": 0}


def test_adapter_without_a_tokenizer_takes_the_bases(tmp_path, random_base, random_lora):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in (adapter.CONFIG, adapter.WEIGHTS):
        shutil.copy(random_lora / name, bare)
    merge(random_base, bare, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        random_base / "tokenizer.json"
    ).read_bytes()
    assert load(tmp_path / "out")[1].name == "model"  # with vicuna_v1.1 in it


PEAK = """
import resource, sys
from pathlib import Path
import torch
from llama_lora.weights.merge_lora import merge
small, small_lora, base, lora, target, shard = sys.argv[1:]
merge(Path(small), Path(small_lora), Path(target) / "small")  # imports, and memory of threads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
written = merge(Path(base), Path(lora), Path(target) / "big", None, int(shard), ("F16",))
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(written.files, written.bytes, growth * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="reads a POSIX account")
def test_memory_is_that_of_shards_not_of_the_model(
    tmp_path, llama_tokenizer, random_base, random_lora
):
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    big = make_base(tmp_path / "big", llama_tokenizer, torch.float16, **size)
    big_lora = make_adapter(tmp_path / "lora", big)
    shard = 10_000_000
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PEAK,
            random_base,
            random_lora,
            big,
            big_lora,
            tmp_path / "out",
            str(shard),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    files, size, growth = map(int, done.stdout.split())
    assert files > 8
    assert growth < 4 * shard < size / 3, f"{growth:,} of {size:,}"


@pytest.mark.slow
def test_smollm2(tmp_path, smollm2_gguf):
    """The demo's base: merged logits within float16's rounding of base and adapter's."""
    from tests.weights.conversion import convert

    base = tmp_path / "base"
    assert convert("--gguf", smollm2_gguf, "--output_dir", base) == 0
    for kind in ("LoRA", "DoRA"):
        lora = make_adapter(tmp_path / kind, base, **KINDS[kind])
        expected = logits(PeftModel.from_pretrained(loaded(base), lora))
        merge(base, lora, tmp_path / f"merged-{kind}", max_shard_size=50_000_000)
        found = logits(loaded(tmp_path / f"merged-{kind}"))
        apart = logits(loaded(base))
        assert (found - expected).abs().max() < 0.02 * (expected - apart).abs().max()
        assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.99
