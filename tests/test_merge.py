"""Merged models compute what base and adapter compute in peft, and bad input is one line."""

import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_lora.chat.adapters import load
from llama_lora.cli import InputError
from llama_lora.model import adapter
from llama_lora.model.template import Template, load_tokenizer
from llama_lora.weights.merge import merge

SCRIPT = ROOT / "fastchat/model/merge_lora.py"
TARGETS = ["q_proj", "v_proj", "down_proj"]
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


def make_base(folder: Path, tokenizer, dtype=torch.float32, **changes) -> Path:
    """A random Llama with grouped queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, **settings) -> Path:
    """An adapter with random matrices, saved as training saves one."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    )
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            elif "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    adapter.save(model, Template(load_tokenizer(base)), folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, llama_tokenizer) -> Path:
    return make_base(tmp_path_factory.mktemp("merge") / "base", llama_tokenizer)


@pytest.fixture(scope="module")
def lora(tmp_path_factory, base) -> Path:
    return make_adapter(tmp_path_factory.mktemp("merge") / "lora", base)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 200)[None]).logits[0]


def loaded(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the script in this process, which spares the imports: exit code, stdout, stderr lines."""
    script = runpy.run_path(str(SCRIPT))

    def run(base, lora, target, *flags) -> tuple[int, str, list[str]]:
        words = ["--base_model", base, "--lora_weights", lora, "--output_dir", target, *flags]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            script["main"](script["parse_args"]())
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err.splitlines()

    return run


@pytest.fixture
def fails(command):
    """Run the script on a command line that it refuses; return its one line."""

    def run(*words) -> str:
        code, _, lines = command(*words)
        assert code == 1
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1, lines
        assert "Traceback" not in "".join(lines)
        return errors[0]

    return run


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


def test_shards_hold_the_same_and_transformers_reads_them(tmp_path, base, lora):
    whole = merge(base, lora, tmp_path / "whole")
    written = merge(base, lora, tmp_path / "cut", max_shard_size=10_000)
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


def test_command_writes_a_folder_that_answers_as_base_and_adapter_do(tmp_path, base, lora, command):
    target = tmp_path / "new" / "merged"
    code, printed, _ = command(base, lora, target, "--gguf", "F16", "Q8_0", "Q8_0")
    assert code == 0
    first, *others = printed.splitlines()
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
    _, wanted, _ = load(base, lora)
    model, template, _ = load(target)
    question = [{"from": "human", "value": "Who are you?"}]
    assert template.prompt_ids(question) == wanted.prompt_ids(question)
    assert AutoTokenizer.from_pretrained(target).chat_template == wanted.jinja
    assert model.generation_config.eos_token_id == wanted.stop_ids


def test_generation_settings_come_along(tmp_path, base, lora):
    """Vicuna's and Llama 2's have a temperature and no do_sample, which transformers won't save."""
    shutil.copytree(base, tmp_path / "base")
    settings = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "eos_token_id": [7]}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    merge(tmp_path / "base", lora, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {**settings, "eos_token_id": [2, 7], "bos_token_id": 1, "pad_token_id": 0}


def test_adapter_without_a_tokenizer_takes_the_bases(tmp_path, base, lora):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in (adapter.CONFIG, adapter.WEIGHTS):
        shutil.copy(lora / name, bare)
    merge(base, bare, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()
    assert load(tmp_path / "out")[1].name == "model"  # with vicuna_v1.1 in it


def test_neither_has_a_tokenizer(tmp_path, base, lora, fails):
    for source, name in ((base, "base"), (lora, "lora")):
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("tok*", "chat*"))
    line = fails(tmp_path / "base", tmp_path / "lora", tmp_path / "out")
    assert f"{tmp_path}/base: no usable tokenizer here" in line


class Payload:
    """What a malicious adapter would have run when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_adapter_of_older_tools(tmp_path, base, lora, fails):
    old = tmp_path / "old"
    shutil.copytree(lora, old)
    weights = load_file(old / adapter.WEIGHTS)
    (old / adapter.WEIGHTS).unlink()
    torch.save(weights, old / adapter.PICKLED)
    merge(base, lora, tmp_path / "a")
    merge(base, old, tmp_path / "b")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert logits(load(base, old)[0]).shape

    torch.save({**weights, "extra": Payload(tmp_path / "executed")}, old / adapter.PICKLED)
    line = fails(base, old, tmp_path / "out")
    assert "expected tensors alone, found the code" in line
    assert "mkdir" in line
    (old / adapter.PICKLED).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    assert "not loaded" in fails(base, old, tmp_path / "out")
    with pytest.raises(InputError, match="not loaded"):
        load(base, old)
    assert not (tmp_path / "executed").exists()
    (old / adapter.PICKLED).write_bytes(b"PK\3\4 cut off")
    assert "cannot be read" in fails(base, old, tmp_path / "out")
    torch.save([1, 2], old / adapter.PICKLED)
    assert "expected a dictionary of tensors" in fails(base, old, tmp_path / "out")


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
def test_damaged_adapter_is_one_line_and_leaves_nothing(tmp_path, base, lora, fails, case):
    damage, expected = DAMAGED[case]
    shutil.copytree(lora, tmp_path / "lora")
    damage(tmp_path / "lora")
    line = fails(base, tmp_path / "lora", tmp_path / "a" / "out")
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
def test_another_base_is_one_line(tmp_path, llama_tokenizer, lora, fails, case):
    changes, expected = OTHER_BASES[case]
    other = make_base(tmp_path / "other", llama_tokenizer, **changes)
    line = fails(other, lora, tmp_path / "out")
    assert f"{lora}: this adapter was not made for the base {other}: " in line
    assert re.search(expected, line), line
    with pytest.raises(InputError) as error:  # the same line in generate.py
        load(other, lora)
    assert line == f"error: {error.value}"


def test_another_architecture_is_one_line(tmp_path, llama_tokenizer, lora, fails):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=2000, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    llama_tokenizer.save_pretrained(tmp_path / "gpt2")
    line = fails(tmp_path / "gpt2", lora, tmp_path / "out")
    assert "expected layers named down_proj, q_proj, v_proj, found" in line


def test_another_vocabulary_of_the_same_size_is_one_line(tmp_path, base, lora, fails):
    shutil.copytree(base, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = state["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    line = fails(tmp_path / "other", lora, tmp_path / "out")
    assert f"expected token 1998 to be '{first}', found '{second}'" in line


def test_base_of_another_name_is_used_and_said_once(tmp_path, base, lora, caplog):
    shutil.copytree(base, tmp_path / "renamed")
    merge(tmp_path / "renamed", lora, tmp_path / "out")
    load(tmp_path / "renamed", lora)
    assert [record.message for record in caplog.records if "trained on" in record.message] == [
        f"({lora} was trained on {base}; the base here is {tmp_path}/renamed)"
    ]


def test_quantized_base_is_one_line(tmp_path, base, lora, fails):
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    line = fails(tmp_path / "base", lora, tmp_path / "out")
    assert "expected 16-bit weights, found weights quantized with bitsandbytes" in line


def test_incomplete_base_is_one_line(tmp_path, base, lora, fails):
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in weights if name != "model.norm.weight"}, file)
    assert "expected the tensor model.norm.weight, found none" in fails(
        tmp_path / "base", lora, tmp_path / "out"
    )
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, file)
    assert "expected model.norm.weight of shape (32,), found (31,)" in fails(
        tmp_path / "base", lora, tmp_path / "out"
    )
    os.truncate(file, 999)
    assert "model.safetensors: cannot be read" in fails(tmp_path / "base", lora, tmp_path / "out")
    file.unlink()
    assert "expected model.safetensors or model.safetensors.index.json" in fails(
        tmp_path / "base", lora, tmp_path / "out"
    )


def test_old_output_stays_whole_until_the_new_one_is(tmp_path, base, lora, fails):
    merge(base, lora, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "--overwrite replaces it" in fails(base, lora, tmp_path / "out")
    shutil.copytree(lora, tmp_path / "lora")
    changed(tmp_path / "lora", lambda w: {k: v * 1e6 for k, v in w.items()})  # beyond float16
    line = fails(base, tmp_path / "lora", tmp_path / "out", "--overwrite")
    assert "values beyond float16" in line
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "lora"}
    assert "expected another folder" in fails(base, lora, base, "--overwrite")


PEAK = """
import resource, sys
from pathlib import Path
import torch
from llama_lora.weights.merge import merge
small, small_lora, base, lora, target, shard = sys.argv[1:]
merge(Path(small), Path(small_lora), Path(target) / "small")  # imports, and memory of threads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
written = merge(Path(base), Path(lora), Path(target) / "big", None, int(shard), ("F16",))
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(written.files, written.bytes, growth * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="reads a POSIX account")
def test_memory_is_that_of_shards_not_of_the_model(tmp_path, llama_tokenizer, base, lora):
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    big = make_base(tmp_path / "big", llama_tokenizer, torch.float16, **size)
    big_lora = make_adapter(tmp_path / "lora", big)
    shard = 10_000_000
    done = subprocess.run(
        [sys.executable, "-c", PEAK, base, lora, big, big_lora, tmp_path / "out", str(shard)],
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
    from conversion import convert

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
