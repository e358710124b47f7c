"""Every script takes a base as its tensors are, or refuses it and names those that are wrong."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llama_lora.chat.adapters import load
from llama_lora.cli import InputError
from llama_lora.hardware.device import dtype_name
from llama_lora.model import adapter
from llama_lora.model.base import load_base
from llama_lora.model.folder import base_fingerprint
from llama_lora.model.folder.config import load_config
from llama_lora.model.folder.shape import shape_of
from llama_lora.weights.hf_reader import FolderWeights
from llama_lora.weights.merge_lora import merge
from tests.conftest import error_line
from tests.model.folder import readers
from tests.weights.merging import loaded, logits, make_adapter, make_base

QUERY = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"


def with_tensors(folder: Path, source: Path, change) -> Path:
    """A copy of a base whose tensors `change` makes of its own, a dictionary."""
    shutil.copytree(source, folder)
    weights = change(load_file(source / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def configured(folder: Path, **settings) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def without(*names: str):
    return lambda weights: {name: weights[name] for name in weights if name not in names}


MISFITS = {
    "missing": (without(NORM), f"expected the tensor {NORM}, found none"),
    "output layer missing": (
        without("lm_head.weight"),
        "expected the tensor lm_head.weight, found none",
    ),
    "many missing": (
        lambda w: {name: w[name] for name in w if "layers.1." not in name},
        "expected the tensors model.layers.1.input_layernorm.weight, "
        "model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight and 6 more",
    ),
    "shape": (
        lambda w: w | {NORM: torch.ones(31)},
        f"expected {NORM} of shape (32,), found (31,)",
    ),
    "biases": (
        lambda w: w | {f"{QUERY}.bias": torch.ones(32)},
        f"found the tensor {QUERY}.bias, for which the model in its config.json has no place",
    ),
    "more layers": (
        lambda w: w | {"model.layers.2.mlp.down_proj.weight": torch.ones(32, 64)},
        "found the tensor model.layers.2.mlp.down_proj.weight, for which the model",
    ),
    "more layers, without the prefix": (
        lambda w: w | {"layers.2.mlp.down_proj.weight": torch.ones(32, 64)},
        "found the tensor layers.2.mlp.down_proj.weight, for which the model",
    ),
    "stored twice": (
        lambda w: w | {f"{QUERY.removeprefix('model.')}.weight": torch.ones(32, 32)},
        f'found the tensor {QUERY.removeprefix("model.")}.weight twice, with "model." before',
    ),
    "bias of the output layer": (
        lambda w: w | {"lm_head.bias": torch.ones(2000)},
        "found the tensor lm_head.bias, for which the model",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_the_config(tmp_path, random_base, random_lora, case):
    change, expected = MISFITS[case]
    base = with_tensors(tmp_path / "base", random_base, change)
    for script, done in readers.all_of(base, random_lora, tmp_path).items():
        assert f"{base}: {expected}" in error_line(done), script
    assert not (tmp_path / "merged").exists()


def test_tensors_beside_the_language_model_do_no_harm(tmp_path, random_base, random_lora):
    """Frequencies that old folders hold, and parts that see images or score answers."""
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "vision_tower.patches.weight": torch.ones(3, 3),
        "v_head.summary.weight": torch.ones(1, 32),
    }
    base = with_tensors(tmp_path / "base", random_base, lambda w: w | more)
    for script, done in readers.all_of(base, random_lora, tmp_path).items():
        assert done.returncode == 0, (script, done.stderr)


# Another way to store the same: the names of the files that are left, by how they are written.
def pickled(folder: Path, weights: dict, **how) -> None:
    torch.save(weights, folder / "pytorch_model.bin", **how)


def pickled_in_shards(folder: Path, weights: dict) -> None:
    names = sorted(weights)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in shards.items():
        torch.save({name: weights[name] for name in part}, folder / file)
    files = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def bare(folder: Path, weights: dict) -> None:
    bare = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})


WAYS = {
    "pickled": pickled,
    "pickled by an old torch": lambda *made: pickled(*made, _use_new_zipfile_serialization=False),
    "pickled in shards": pickled_in_shards,
    "without the prefix": bare,
    "pickled without the prefix": lambda folder, weights: pickled(
        folder, {name.removeprefix("model."): weight for name, weight in weights.items()}
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_files_and_names(tmp_path, random_base, random_lora, way, caplog):
    base = shutil.copytree(random_base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    WAYS[way](base, weights)
    for script, done in readers.all_of(base, random_lora, tmp_path).items():
        assert done.returncode == 0, (script, done.stderr)
    assert base_fingerprint.same(tmp_path / "output" / adapter.WEIGHTS, base)
    assert base_fingerprint.same(random_lora / adapter.WEIGHTS, base)
    merge(random_base, random_lora, tmp_path / "expected")
    expected, merged = (
        load_file(tmp_path / name / "model.safetensors") for name in ("expected", "merged")
    )
    assert expected.keys() == merged.keys()
    assert all(torch.equal(expected[name], merged[name]) for name in expected)
    assert "trained on" not in caplog.text


@pytest.mark.parametrize("stored", ["model.safetensors", "pytorch_model.bin"])
def test_an_output_layer_of_its_own_under_a_config_that_ties(
    tmp_path, llama_tokenizer, random_base, stored
):
    """It is loaded, counted, merged and exported; config.json of the merged model says so."""
    base = configured(shutil.copytree(random_base, tmp_path / "base"), tie_word_embeddings=True)
    expected = logits(loaded(random_base))
    if stored == "pytorch_model.bin":
        weights = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        pickled(base, weights)
    assert torch.allclose(logits(load_base(base, dtype=torch.float32)), expected)
    assert shape_of(base).parameters == shape_of(random_base).parameters
    lora = make_adapter(tmp_path / "lora", base)
    done = readers.merge(base, lora, tmp_path, "--gguf", "F32", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    merged = tmp_path / "merged"
    assert not json.loads((merged / "config.json").read_text())["tie_word_embeddings"]
    adapted = logits(PeftModel.from_pretrained(loaded(random_base), lora))
    assert torch.allclose(logits(loaded(merged)), adapted, atol=1e-4)
    exported = AutoModelForCausalLM.from_pretrained(
        merged, gguf_file="merged-F32.gguf", dtype=torch.float32
    )
    assert torch.allclose(logits(exported), adapted, atol=1e-4)


def test_an_output_layer_of_its_own_is_said(tmp_path, random_base, caplog):
    base = configured(shutil.copytree(random_base, tmp_path / "base"), tie_word_embeddings=True)
    load_config(base)
    load_config(base)
    assert caplog.text.count("but the folder stores another one: that one is used") == 1


@pytest.mark.parametrize("left", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_one_tensor_for_both_ends(tmp_path, llama_tokenizer, left):
    """Tied weights are stored under either name, or twice."""
    tied = make_base(tmp_path / "tied", llama_tokenizer, tie_word_embeddings=True)
    weights = load_file(tied / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    other = {"model.embed_tokens.weight", "lm_head.weight"} - {left} if left != "both" else ()
    base = with_tensors(tmp_path / "base", tied, lambda _: without(*other)(weights))
    lora = make_adapter(tmp_path / "lora", tied)
    expected = logits(PeftModel.from_pretrained(loaded(tied), lora))
    assert torch.allclose(logits(load(base, lora)[0].float()), expected, atol=0.1)
    merge(base, lora, tmp_path / "merged", torch.float32)
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.allclose(logits(loaded(tmp_path / "merged")), expected, atol=1e-4)


# Bases that are stored quantized

BITS = {
    "8bit": {"load_in_8bit": True},
    "4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}

MLP = "gate_proj", "up_proj", "down_proj"
CODES = {"8bit": "int8", "4bit": "uint8"}


@pytest.fixture(scope="module")
def half(random_base, tmp_path_factory) -> Path:
    """`random_base` in float16."""
    folder = tmp_path_factory.mktemp("half") / "base"
    return with_tensors(folder, random_base, lambda w: {name: w[name].half() for name in w})


@pytest.fixture(scope="module", params=BITS)
def quantized(request, half, tmp_path_factory) -> tuple[str, Path]:
    """The precision, and the folder as transformers saves it."""
    folder = tmp_path_factory.mktemp("quantized") / request.param
    shutil.copytree(half, folder)
    config = BitsAndBytesConfig(**BITS[request.param])
    model = AutoModelForCausalLM.from_pretrained(
        half, quantization_config=config, dtype=torch.float16
    )
    model.save_pretrained(folder)
    return request.param, folder


def test_a_quantized_base_is_loaded_as_what_it_is(tmp_path, quantized, half, random_lora):
    precision, base = quantized
    done = readers.all_of(base, random_lora, tmp_path)
    line = error_line(done.pop("merge"))
    assert (
        "expected 16-bit weights, found weights quantized with bitsandbytes; use the base" in line
    )
    said = f"{precision} base, as it is stored, which --quantization none cannot change"
    for script, ended in done.items():
        assert ended.returncode == 0, (script, ended.stderr)
        assert said in ended.stdout + ended.stderr, script
    assert (
        json.loads((tmp_path / "output" / "summary.json").read_text())["quantization"] == precision
    )
    # Like what is quantized while it is loaded, in another dtype than it was written in.
    ours, on_the_fly = (
        load_base(base, dtype=torch.float32),
        load_base(half, precision, torch.float32),
    )
    assert torch.allclose(logits(ours), logits(on_the_fly), atol=1e-4)
    assert ours.dtype == torch.float32
    # What was trained on it is merged into the base that it was made from.
    assert readers.merge(half, tmp_path / "output", tmp_path).returncode == 0


def test_the_flag_that_says_the_same(tmp_path, quantized):
    precision, base = quantized
    done = readers.train(base, tmp_path, "--quantization", precision, "--dry_run", "True")
    assert done.returncode == 0, done.stderr
    assert f"{precision} base, as it is stored\n" in done.stdout
    assert f" M in {precision[0]} bits" in done.stdout


def test_dora_on_a_quantized_base(tmp_path, quantized):
    precision, base = quantized
    done = readers.train(base, tmp_path, "--use_dora", "True", "--quantization", "auto")
    assert done.returncode == 0, done.stderr


def test_codes_of_which_the_config_says_nothing(tmp_path, quantized):
    precision, folder = quantized
    base = configured(shutil.copytree(folder, tmp_path / "base"), quantization_config=None)
    ours, told = (load_base(path, dtype=torch.float32) for path in (base, folder))
    assert torch.equal(logits(ours), logits(told))
    done = readers.generate(base)
    assert f"{precision} base, as it is stored" in done.stderr


def test_a_part_of_a_quantized_weight_is_missing(tmp_path, quantized, random_lora):
    precision, folder = quantized
    parts = {
        "8bit": [f"{QUERY}.SCB"],
        "4bit": [
            f"{QUERY}.weight.{part}"
            for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        ],
    }
    for name in (*parts[precision], f"{QUERY}.weight", NORM):
        base = with_tensors(tmp_path / name, folder, without(name))
        done = readers.all_of(base, random_lora, tmp_path)
        done.pop("merge")  # of no quantized base
        for script, ended in done.items():
            assert f"{base}: expected the tensor {name}, found none" in error_line(ended), script


def test_codes_of_another_shape_than_the_config_says(tmp_path, quantized, random_lora):
    _, folder = quantized
    base = configured(shutil.copytree(folder, tmp_path / "base"), intermediate_size=128)
    done = readers.all_of(base, random_lora, tmp_path)
    done.pop("merge")
    shapes = "down_proj.weight of shape (32, 128), found (32, 64)"
    for script, ended in done.items():
        assert f"{base}: expected model.layers.0.mlp.{shapes}" in error_line(ended), script


def test_a_base_that_is_partly_quantized_is_planned_as_stored(tmp_path, half):
    """As published bases are that leave what suffers most in 16 bits."""
    for precision, settings in BITS.items():
        base = shutil.copytree(half, tmp_path / precision)
        config = BitsAndBytesConfig(**settings, llm_int8_skip_modules=[*MLP, "lm_head"])
        model = AutoModelForCausalLM.from_pretrained(
            half, quantization_config=config, dtype=torch.float16
        )
        model.save_pretrained(base)
        shape, whole = shape_of(base), shape_of(half)
        stored = sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
        assert shape.weight_bytes(precision, 2) == stored
        assert shape.weight_bytes(precision, 4) - stored == 2 * (whole.parameters - shape.quantized)
        attention = sum(math.prod(whole.linears[f"{name}_proj"]) for name in "qkvo")
        assert shape.quantized == 2 * attention


def test_a_config_that_calls_floats_codes(tmp_path, quantized, random_base, random_lora):
    _, folder = quantized
    base = shutil.copytree(random_base, tmp_path / "base")
    shutil.copy(folder / "config.json", base)
    done = readers.all_of(base, random_lora, tmp_path)
    done.pop("merge")
    for script, ended in done.items():
        assert "quantized with bitsandbytes, but none is" in error_line(ended), script


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_other_ways_of_quantizing_are_refused(tmp_path, random_base, random_lora, method):
    settings = {"quant_method": method, "bits": 4, "group_size": 128}
    base = configured(shutil.copytree(random_base, tmp_path / "base"), quantization_config=settings)
    for script, done in readers.all_of(base, random_lora, tmp_path).items():
        line = error_line(done)
        assert f"{base}: its weights are quantized with {method}, expected 16 bits" in line, script


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int32, torch.int8])
def test_dtypes_that_are_no_floats_of_ours(tmp_path, random_base, random_lora, dtype):
    """A merge would round 64 bits in silence, and all would read integers as weights."""
    base = with_tensors(tmp_path / "base", random_base, lambda w: w | {NORM: w[NORM].to(dtype)})
    expected = f"{base}: expected {NORM} in float16, bfloat16, float32, found {dtype_name(dtype)}"
    for script, done in readers.all_of(base, random_lora, tmp_path).items():
        assert expected in error_line(done), script


def test_codes_without_their_scales(tmp_path, quantized, random_lora):
    """Neither these nor the config tell that they are codes."""
    precision, folder = quantized
    lost = {"8bit": ".SCB", "4bit": ".weight."}[precision]
    base = with_tensors(
        tmp_path / "base", folder, lambda w: {name: w[name] for name in w if lost not in name}
    )
    configured(base, quantization_config=None)
    for script, done in readers.all_of(base, random_lora, tmp_path).items():
        expected = f"_proj.weight in float16, bfloat16, float32, found {CODES[precision]}"
        assert expected in error_line(done), script


def test_integers_that_are_no_weights_do_no_harm(tmp_path, random_base):
    more = {"model.layers.0.self_attn.positions": torch.arange(4), "step": torch.tensor([True])}
    load_config(with_tensors(tmp_path / "base", random_base, lambda w: w | more))


# Reading the files


def test_files_are_read_once_as_long_as_they_stay_the_same(tmp_path, random_base, monkeypatch):
    """An old pickle, which takes the memory of all its tensors each time."""
    base = configured(shutil.copytree(random_base, tmp_path / "base"), tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    pickled(base, weights, _use_new_zipfile_serialization=False)
    read, load_pickle = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda *given, **how: read.append(given) or load_pickle(*given, **how)
    )
    assert not load_config(base).tie_word_embeddings
    assert len(read) == 2  # once for the names, once to compare values
    assert not load_config(base).tie_word_embeddings
    shape_of(base)
    assert len(read) == 2
    pickled(base, weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    assert load_config(base).tie_word_embeddings
    (base / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="expected model.safetensors"):
        FolderWeights(base)


def test_a_config_is_not_shared(random_base):
    load_config(random_base).num_hidden_layers = 1
    assert load_config(random_base).num_hidden_layers == 2


# Configs that make no model

UNUSABLE = {
    "a size that is text": {"hidden_size": "abc"},
    "positions that are text": {"max_position_embeddings": "512"},
    "rope that is text": {"rope_scaling": "linear"},
    "no heads": {"num_attention_heads": 0},
    "sizes that do not fit": {"hidden_size": 31},
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_settings_that_make_no_model(tmp_path, random_base, random_lora, case):
    base = configured(shutil.copytree(random_base, tmp_path / "base"), **UNUSABLE[case])
    for script, done in readers.all_of(base, random_lora, tmp_path).items():
        assert f"{base}: this model cannot be loaded: " in error_line(done), script


def test_a_quantization_that_is_no_object(tmp_path, random_base, random_lora):
    base = configured(shutil.copytree(random_base, tmp_path / "base"), quantization_config="8bit")
    expected = f"{base}/config.json: expected \"quantization_config\" to be an object, found '8bit'"
    for script, done in readers.all_of(base, random_lora, tmp_path).items():
        assert expected in error_line(done), script
